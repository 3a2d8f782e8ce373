/* Components that the pages share. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useRef, format } = Pellucid;

  // ------------------------------------------------------------------ text that may be hostile
  // What cannot be seen, or moves other characters: controls, format characters (bidi, zero-width, tags), unpaired surrogates,
  // private use, line separators, variation selectors, blank fillers, noncharacters.
  const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\p{Variation_Selector}\p{Noncharacter_Code_Point}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]/u;
  const RUNS = new RegExp(`${UNSEEN.source}|[^]+?(?=${UNSEEN.source}|$)`, "gu");
  const SIGNS = { "\n": "↵", "\t": "⇥" };

  const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  /** The sign that stands for one unseen character. */
  const markOf = (character) => SIGNS[character] ?? `⟨${codePoint(character)}⟩`;

  /** The first `limit` characters; never half of a pair. */
  function cut(text, limit) {
    if (text.length <= limit) return text;
    const last = text.charCodeAt(limit - 1);
    return text.slice(0, last >= 0xd800 && last < 0xdc00 ? limit - 1 : limit);
  }

  /** Text as it is: unseen characters as marks, direction kept inside, cut at `limit` with a note of the whole length. */
  function Visible({ text, limit = Infinity, multiline = false }) {
    const whole = String(text ?? "");
    const shown = cut(whole, limit);
    const parts = [];
    for (const [part] of shown.matchAll(RUNS)) {
      if (part.length > 2 || !UNSEEN.test(part)) { parts.push(part); continue; }
      parts.push(html`<span class="unseen" title=${codePoint(part)}>${markOf(part)}</span>`);
      if (part === "\n" && multiline) parts.push(html`<br />`);
    }
    return html`<bdi class="visible">${parts}${shown.length < whole.length
      && html`<span class="unseen cut">… ${t("shell.characters", format(whole.length))}</span>`}</bdi>`;
  }
  /** The same as a plain string, for tooltips, axes and options. */
  const visibleText = (text, limit = Infinity) => {
    const shown = cut(String(text ?? ""), limit);
    return [...shown].map((c) => (UNSEEN.test(c) ? markOf(c) : c)).join("") + (shown.length < String(text ?? "").length ? "…" : "");
  };

  // ------------------------------------------------------------------ frames
  function Panel({ title, hint, actions, children, name }) {
    return html`<section class=${`panel ${name || ""}`}>
      ${(title || actions) && html`<header class="panel-head">
        <h2>${hint ? html`<${Hint} text=${hint}>${title}<//>` : title}</h2>
        ${actions && html`<div class="panel-actions">${actions}</div>`}
      </header>`}
      ${children}
    </section>`;
  }

  function Failure({ error }) {
    return html`<p class="failure" role="alert"><span aria-hidden="true">⚠ </span><${Visible} text=${error?.message ?? error} limit=${600} /></p>`;
  }
  const Loading = () => html`<p class="muted loading" role="status">${t("shell.loading")}</p>`;
  const Empty = ({ children }) => html`<p class="empty muted">${children}</p>`;

  // ------------------------------------------------------------------ explanations
  /** Children with an explanation on hover, focus and touch. */
  const Hint = ({ text, children }) => html`<span class="hint" tabindex="0" data-tip=${text}>${children}</span>`;

  /** A quantity of the glossary with its meaning, formula and unit as a hint. Children default to its name. */
  function Term({ name, children }) {
    const text = explain(name);
    return text ? html`<${Hint} text=${text}>${children ?? name}<//>` : html`<span>${children ?? name}</span>`;
  }
  /** Meaning, formula and unit of a glossary entry as text, or null. */
  function explain(name) {
    const entry = Pellucid.glossary[name];
    if (!entry) return null;
    return [entry.text, entry.formula, entry.unit && t("shell.unit", entry.unit)].filter(Boolean).join("\n");
  }

  /** The one tooltip of the page, beside whatever with data-tip is hovered or focused. */
  function Tips() {
    const [tip, setTip] = useState(null);
    const box = useRef();
    useEffect(() => {
      const show = (event) => {
        const target = event.target.closest?.("[data-tip]");
        setTip((old) => (target ? { target, text: target.dataset.tip } : old && null));
      };
      const hide = (event) => { if (event.type !== "keydown" || event.key === "Escape") setTip(null); };
      const events = [["mouseover", show], ["focusin", show], ["focusout", hide], ["keydown", hide], ["scroll", hide]];
      events.forEach(([name, fn]) => document.addEventListener(name, fn, { capture: true, passive: true }));
      return () => events.forEach(([name, fn]) => document.removeEventListener(name, fn, { capture: true }));
    }, []);
    Pellucid.useLayoutEffect(() => {
      if (!tip) return undefined;
      place(box.current, tip.target);
      tip.target.setAttribute("aria-describedby", "tip");
      return () => tip.target.removeAttribute("aria-describedby");
    }, [tip]);
    return html`<div id="tip" role="tooltip" ref=${box} hidden=${!tip}>${tip?.text}</div>`;
  }
  function place(box, target) {
    const around = target.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = box;
    const below = around.bottom + 6 + height < innerHeight || around.top < height + 6;
    box.style.left = `${Math.max(8, Math.min(around.left, innerWidth - width - 8))}px`;
    box.style.top = `${below ? around.bottom + 6 : around.top - height - 6}px`;
  }

  // ------------------------------------------------------------------ controls
  /** One of a few choices: options [[value, label, hint?]]. */
  function Choice({ label, options, value, onChange }) {
    return html`<span class="choice" role="group" aria-label=${label}>
      ${options.map(([option, name, hint]) => html`<button type="button" key=${option} aria-pressed=${option === value ? "true" : "false"}
        data-tip=${hint} onClick=${() => onChange(option)}>${name}</button>`)}
    </span>`;
  }

  /** A dialog over the page; Escape and the ground behind it close it. */
  function Dialog({ title, onClose, children }) {
    const box = useRef();
    useEffect(() => {
      const before = document.activeElement;
      box.current.showModal();
      return () => before?.focus?.();
    }, []);
    return html`<dialog ref=${box} class="dialog" aria-label=${title} onClose=${onClose}
        onClick=${(event) => event.target === box.current && box.current.close()}>
      <div class="dialog-body">
        <header class="panel-head"><h2>${title}</h2><button type="button" onClick=${() => box.current.close()}>${t("shell.close")}</button></header>
        ${children}
      </div>
    </dialog>`;
  }

  /** [ref, width]: the width of an element in px, as it changes; 0 before it is known. */
  function useWidth() {
    const box = useRef();
    const [width, setWidth] = useState(0);
    Pellucid.useLayoutEffect(() => {
      const read = () => setWidth(Math.floor(box.current.clientWidth));
      const watcher = new ResizeObserver(read);
      watcher.observe(box.current);
      read();
      return () => watcher.disconnect();
    }, []);
    return [box, width];
  }

  // ------------------------------------------------------------------ histogram
  /** A histogram {low, high, counts} as bars, with a line at 0 where it lies inside. */
  function Bars({ histogram, label, height = 64 }) {
    const { low, high, counts } = histogram || {};
    if (!counts?.length || !(high >= low)) return html`<span class="muted">–</span>`;
    const most = Math.max(...counts, 1);
    const width = 100 / counts.length;
    const edge = (i) => low + ((high - low) * i) / counts.length;
    const bar = (count, i) => html`<g key=${i}>
      <title>${`${format(edge(i))} … ${format(edge(i + 1))}: ${format(count)}`}</title>
      <rect class="bars-slot" x=${i * width} y="0" width=${width} height="100" />
      <rect class="bars-bar" x=${i * width + width * 0.06} width=${width * 0.88}
        y=${100 - (100 * count) / most} height=${(100 * count) / most} />
    </g>`;
    const zero = low < 0 && high > 0 ? (100 * -low) / (high - low) : null;
    return html`<figure class="bars">
      <svg viewBox="0 0 100 100" preserveAspectRatio="none" style=${{ height: `${height}px` }} role="img"
        aria-label=${t("shell.histogram", label ?? "", format(low), format(high))}>
        ${counts.map(bar)}
        ${zero !== null && html`<line class="bars-zero" x1=${zero} x2=${zero} y1="0" y2="100" vector-effect="non-scaling-stroke" />`}
      </svg>
      <figcaption><span>${format(low)}</span><span>${label}</span><span>${format(high)}</span></figcaption>
    </figure>`;
  }

  Object.assign(Pellucid, { Visible, visibleText, Panel, Failure, Loading, Empty, Hint, Term, explain, Tips, Choice, Dialog, useWidth, Bars });
})();
