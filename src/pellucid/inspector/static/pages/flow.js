/* The data flow of one step: a diagram whose boxes are buttons, and the detail of the box that is looked at. */
(() => {
  "use strict";
  const { html, t, useState, useMemo, useRef, useEffect, useLayoutEffect, stepGraph, stepLayout } = Pellucid;
  const LEGEND = ["model", "function", "data", "op", "absent"];

  /** [ref, width]: the width of an element in px, as it changes. */
  function useWidth() {
    const box = useRef();
    const [width, setWidth] = useState(0);
    useLayoutEffect(() => {
      const read = () => setWidth(Math.floor(box.current.clientWidth));
      read();
      const observer = new ResizeObserver(read);
      observer.observe(box.current);
      return () => observer.disconnect();
    }, []);
    return [box, width];
  }
  function fontsOf() {
    const family = getComputedStyle(document.body).fontFamily;
    return { title: `650 13px ${family}`, facts: `11.5px ${family}`, mono: `600 12px ${Pellucid.cssValue("--mono") || "monospace"}` };
  }

  // ------------------------------------------------------------------ shapes: form, not colour, tells models, data and computations apart
  function outline({ node, x, y, width: w, height: h }) {
    const edge = 9;
    if (node.shape === "data") return html`<path class="step-box" d=${`M${x} ${y}h${w - edge}l${edge} ${edge}v${h - edge}h${-w}z`} />
      <path class="step-fold" d=${`M${x + w - edge} ${y}v${edge}h${edge}`} />`;
    if (node.shape === "function") return html`<rect class="step-box" x=${x} y=${y} width=${w} height=${h} />
      <path class="step-fold" d=${`M${x + 4} ${y}v${h}M${x + w - 4} ${y}v${h}`} />`;
    if (node.shape === "op") return html`<path class="step-box"
      d=${`M${x + edge} ${y}h${w - 2 * edge}l${edge} ${edge}v${h - 2 * edge}l${-edge} ${edge}h${-(w - 2 * edge)}l${-edge} ${-edge}v${-(h - 2 * edge)}z`} />`;
    return html`<rect class="step-box" x=${x} y=${y} width=${w} height=${h} rx="9" />
      ${node.shape === "model" && html`<rect class="step-bar" x=${x + 4} y=${y + 7} width="4" height=${h - 14} rx="2" />`}`;
  }
  function Box({ box, isOpen, on }) {
    const { node, lines, titles, x, y } = box;
    const below = y + 20 + 18 * titles.length; // the first line of facts
    const left = x + 8 + (node.shape === "model" ? 6 : 0);
    const keys = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      on.choose(node.id, true);
    };
    return html`<g class=${`step-node step-${node.shape} ${isOpen ? "is-open" : ""}`} role="button" tabindex="0" data-node=${node.id}
        aria-label=${[node.title, t(`step.legend.${node.shape}`), ...node.facts].join(", ")} aria-haspopup="dialog" aria-expanded=${isOpen ? "true" : "false"}
        onClick=${() => on.choose(node.id, false)} onKeyDown=${keys}
        onMouseEnter=${() => on.look(node.id)} onMouseLeave=${() => on.leave()} onFocus=${() => on.look(node.id)} onBlur=${() => on.leave()}>
      ${outline(box)}
      ${titles.map((title, i) => html`<text class=${`step-name ${node.mono ? "is-mono" : ""}`} x=${left} y=${y + 21 + 18 * i} key=${i}>${title}</text>`)}
      ${lines.map((line, i) => html`<text class="step-fact" x=${left} y=${below + 15 * i} key=${i}>${line}</text>`)}
    </g>`;
  }
  const lineOf = (arrow) => `M${arrow.points.map((point) => point.join(" ")).join("L")}`;
  /** The arrows of one source: first the ground below all of them, which sets them off from what they cross, then the lines. */
  function Arrows({ arrows }) {
    return html`<g class="step-arrow">
      ${arrows.map((arrow) => html`<path class="step-halo" d=${lineOf(arrow)} key=${arrow.key} />`)}
      ${arrows.map((arrow) => html`<path class=${`step-line ${arrow.heavy ? "is-heavy" : ""}`} d=${lineOf(arrow)} marker-end="url(#step-head)" key=${arrow.key} />`)}
    </g>`;
  }
  const Label = ({ arrow: { at, label } }) => html`<text class="step-flow-label" x=${at[0]} y=${at[1]} text-anchor=${at[2]}>${label}</text>`;
  const Band = ({ band }) => html`<g class="step-band">
    <rect x=${band.x} y=${band.y} width=${band.width} height=${band.height} rx="8" />
  </g>`;
  const BandTitle = ({ band }) => html`<g class="step-band">
    <text class="step-band-title" x=${band.x + 10} y=${band.y + 18}>${band.title}</text>
    <text class="step-band-how" x=${band.x + band.width - 10} y=${band.y + 18} text-anchor="end">${band.how}</text>
  </g>`;

  function Legend({ shapes }) {
    return html`<ul class="step-legend">${LEGEND.filter((shape) => shapes.has(shape)).map((shape) => html`<li key=${shape}>
      <svg width="30" height="20" aria-hidden="true"><g class=${`step-node step-${shape}`}>${outline({ node: { shape }, x: 1, y: 1, width: 28, height: 18 })}</g></svg>
      ${t(`step.legend.${shape}`)}</li>`)}</ul>`;
  }

  // ------------------------------------------------------------------ which box is looked at
  /** {open, pinned, on}: hover and focus show a box's detail, a click or Enter keeps it. `first`: the box of the address. */
  function useChoice(first, onPin) {
    const [{ open, pinned, byKey }, set] = useState({ open: first ?? null, pinned: Boolean(first), byKey: false });
    const timer = useRef(null);
    const returning = useRef(null); // the box that gets the focus back: this must not open it again
    const later = (change, ms) => { clearTimeout(timer.current); timer.current = setTimeout(() => set(change), ms); };
    useEffect(() => () => clearTimeout(timer.current), []);
    const on = {
      look(id) {
        if (returning.current !== id) later((old) => (old.pinned ? old : { open: id, pinned: false }), 90);
        returning.current = null;
      },
      leave: () => later((old) => (old.pinned ? old : { open: null, pinned: false }), 220),
      stay: () => clearTimeout(timer.current),
      choose(id, byKeyboard) {
        clearTimeout(timer.current);
        const again = pinned && open === id;
        set({ open: again ? null : id, pinned: !again, byKey: byKeyboard });
        onPin(again ? null : id);
      },
      giveBack(id, node) {
        returning.current = id;
        node?.focus();
      },
      close() {
        clearTimeout(timer.current);
        set({ open: null, pinned: false });
        if (pinned) onPin(null);
      },
    };
    return { open, pinned, byKey, on };
  }

  /** The detail beside its box; over the page, so that nothing moves. Escape closes it and gives the focus back. */
  function Popover({ box, pinned, takesFocus, on, width, children }) {
    const frame = useRef();
    const wide = Math.min(440, width);
    const left = Math.max(0, Math.min(box.x + box.width / 2 - wide / 2, width - wide));
    const [top, setTop] = useState(box.y + box.height + 8);
    useLayoutEffect(() => {
      const ground = frame.current.parentElement.getBoundingClientRect().top;
      const height = frame.current.offsetHeight;
      const [above, below] = [ground + box.y, innerHeight - (ground + box.y + box.height)];
      setTop(below < height + 12 && above > below ? box.y - height - 8 : box.y + box.height + 8);
    }, [box]);
    useEffect(() => {
      if (!pinned) return;
      if (takesFocus) frame.current.focus({ preventScroll: true });
      frame.current.scrollIntoView({ block: "nearest" });
    }, [pinned, takesFocus, box.node.id, top]);
    return html`<div ref=${frame} class=${`step-popover ${pinned ? "is-pinned" : ""}`} role="dialog" aria-label=${t("step.detail.pinned", box.node.title)} tabindex="-1"
        style=${{ left: `${left}px`, top: `${top}px`, width: `${wide}px` }}
        onMouseEnter=${on.stay} onMouseLeave=${on.leave} onFocusIn=${on.stay}>${children}</div>`;
  }

  function Flow({ index, step, chosen, onPin, detail }) {
    const [frame, width] = useWidth();
    const graph = useMemo(() => stepGraph(index), [index, Pellucid.language]);
    const layout = useMemo(() => (width ? stepLayout(graph, width, fontsOf()) : null), [graph, width]);
    const { open, pinned, byKey, on } = useChoice(chosen, onPin);
    const box = layout?.boxes.find((one) => one.node.id === open);
    const close = () => {
      const holdsFocus = frame.current.querySelector(".step-popover")?.contains(document.activeElement);
      on.close();
      if (holdsFocus) on.giveBack(box.node.id, frame.current.querySelector(`[data-node="${box.node.id}"]`));
    };
    Pellucid.useKeys({ Escape: () => {
      if (!box) return false;
      close();
      return undefined;
    } });
    if (graph.nodes.length < 2) return html`<div ref=${frame}><${Pellucid.Empty}>${t("step.flow.nothing")}<//></div>`;
    return html`<${Legend} shapes=${new Set(graph.nodes.map((node) => node.shape))} />
      <div class="step-flow" ref=${frame}>
        ${layout && html`<svg width=${width} height=${layout.height} role="group" aria-label=${t("step.flow.label", step)}>
          <defs><marker id="step-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse" markerUnits="userSpaceOnUse"><path class="step-head" d="M0 0L8 4L0 8z" /></marker></defs>
          ${layout.bands.map((band) => html`<${Band} band=${band} key=${band.id} />`)}
          ${[...new Set(layout.arrows.map((arrow) => arrow.from))].map((from) => html`<${Arrows} arrows=${layout.arrows.filter((arrow) => arrow.from === from)} key=${from} />`)}
          ${layout.bands.map((band) => html`<${BandTitle} band=${band} key=${band.id} />`)}
          ${layout.arrows.filter((arrow) => arrow.label && arrow.at).map((arrow) => html`<${Label} arrow=${arrow} key=${arrow.key} />`)}
          ${layout.boxes.map((one) => html`<${Box} box=${one} isOpen=${one === box} on=${on} key=${one.node.id} />`)}
        </svg>`}
        ${box && html`<${Popover} box=${box} pinned=${pinned} takesFocus=${byKey} on=${on} width=${width}>${detail(box.node, close)}<//>`}
      </div>`;
  }

  Object.assign(Pellucid, { StepFlow: Flow, useWidth });
})();
