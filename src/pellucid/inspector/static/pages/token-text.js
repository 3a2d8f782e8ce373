/* The tokens of a sample, coloured by a quantity, with its legend and its chart. */
(() => {
  "use strict";
  const { html, t, format, diverging, sequential, useLayoutEffect, useMemo, useRef, link } = Pellucid;

  /** Quantities to colour by. of: the recorded array; sign: -1 shows what is recorded with its sign turned; kind: the scale. */
  const QUANTITIES = {
    push: { of: "logprob_grads", sign: -1, kind: "diverging", ends: ["token.legend.down", "token.legend.up"] },
    advantages: { kind: "diverging" }, rewards: { kind: "diverging" }, kl: { kind: "diverging" }, log_ratio: { kind: "diverging" }, clipped: { kind: "flag" },
    rollout_logprobs: { kind: "surprise" }, old_logprobs: { kind: "surprise" }, ref_logprobs: { kind: "surprise" }, logprobs: { kind: "surprise" },
    entropy: { kind: "sequential" }, old_values: { kind: "diverging" }, returns: { kind: "diverging" }, values: { kind: "diverging" },
    value_push: { of: "value_grads", sign: -1, kind: "diverging" },
  };
  const available = (arrays) => Object.keys(QUANTITIES).filter((name) => arrays[QUANTITIES[name].of ?? name]);

  /** {value(t), low, high, paint(x)} of a quantity over the sample's actions. One outlier, such as the score among KL prices, must
   *  not leave the others without colour: the scale ends at the 95th percentile, and what is beyond has the full colour. */
  function scaleOf(arrays, actions, name) {
    const { of = name, sign = 1, kind, ends } = QUANTITIES[name];
    const array = arrays[of], isAction = arrays.action_mask;
    const value = (at) => (isAction[at] ? sign * array[at] || 0 : null);
    if (kind === "flag") return { kind, value, low: 0, high: 1, paint: (x) => (x === null ? {} : x ? diverging(-1, 1) : diverging(0, 1)) };
    const sizes = actions.map((at) => Math.abs(array[at])).filter(Number.isFinite).sort((a, b) => a - b);
    const limit = sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) || 1;
    if (kind === "diverging") return { kind, ends, value, low: -limit, high: limit, paint: (x) => diverging(x, limit) };
    if (kind === "surprise") return { kind, value, low: -limit, high: 0, paint: (x) => sequential(x === null ? null : -x, 0, limit) };
    return { kind, value, low: 0, high: limit, paint: (x) => sequential(x, 0, limit) };
  }

  // ------------------------------------------------------------------ legend and chart
  const STEPS = 7;
  function Legend({ scale }) {
    const { low, high, paint, kind, ends } = scale;
    const swatch = (x, text) => html`<span key=${x} class="token-swatch" style=${paint(x)}>${text}</span>`;
    if (kind === "flag") return html`<span class="token-legend">${swatch(0, t("token.legend.no"))}${swatch(1, t("token.legend.yes"))}</span>`;
    const points = Array.from({ length: STEPS }, (_, i) => low + ((high - low) * i) / (STEPS - 1));
    return html`<span class="token-legend">${ends && html`<span>${t(ends[0])}</span>`}
      ${points.map((x) => swatch(x, format(Number(x.toPrecision(2)) || 0)))}${ends && html`<span>${t(ends[1])}</span>`}</span>`;
  }

  /** Bars over the response, from 0; the selected token is marked. */
  function Chart({ arrays, scale, name, selected, onSelect }) {
    const first = Math.max(arrays.response_mask.indexOf(1), 0), n = Math.max(arrays.input_ids.length - first, 1);
    const drawn = useMemo(() => {
      const values = Array.from({ length: n }, (_, i) => scale.value(first + i));
      const finite = values.filter((x) => x !== null && Number.isFinite(x));
      const low = Math.min(0, ...finite), high = Math.max(0, ...finite), span = high - low || 1;
      const y = (x) => (100 * (high - x)) / span;
      const path = values.map((x, i) => (x === null || !Number.isFinite(x) ? "" : `M${i + 0.1} ${y(0)}V${y(x)}h.8V${y(0)}z`)).join("");
      return { low, high, zero: y(0), path };
    }, [scale]);
    const pick = (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      onSelect(first + Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n))));
    };
    const at = selected - first, label = t("token.chart", t(`token.by.${name}`), format(drawn.low), format(drawn.high));
    return html`<figure class="token-chart">
      <svg viewBox=${`0 0 ${n} 100`} preserveAspectRatio="none" role="img" aria-label=${label} data-tip=${t("token.chartHint")} onClick=${pick}>
        ${at >= 0 && html`<rect class="token-chart-at" x=${at - n / 500} width=${1 + n / 250} y="0" height="100" />`}
        <path d=${drawn.path} /><line x1="0" x2=${n} y1=${drawn.zero} y2=${drawn.zero} vector-effect="non-scaling-stroke" />
      </svg>
      <figcaption><span>${format(drawn.high)}</span><span>${format(drawn.low)}</span></figcaption>
    </figure>`;
  }

  // ------------------------------------------------------------------ the tokens
  function oneToken({ record, scale, name, wrong, place }, at) {
    const { arrays, pieces } = record;
    const id = arrays.input_ids[at], value = scale.value(at), isAction = arrays.action_mask[at], isWrong = wrong.has(at);
    const tip = [t("token.tip", at, id), isAction ? `${t(`token.by.${name}`)}: ${format(value)}` : t("token.tipNone"), isWrong && `✗ ${t("token.tipWrong")}`];
    const kind = `${isAction ? "" : "token-plain"} ${isWrong ? "token-wrong" : ""}`;
    return html`<a key=${at} class=${`token ${kind}`} href=${link({ ...place, token: at })} data-t=${at} tabindex="-1" style=${scale.paint(value)}
      data-tip=${tip.filter(Boolean).join("\n")}><${Pellucid.Piece} piece=${pieces[id]} multiline=${true} /></a>`;
  }

  const LONG_PROMPT = 200;
  /** All tokens. They are made once a sample and quantity; the selected one is marked from outside, so that selecting is fast. */
  function Tokens({ record, scale, name, wrong, place, linked, selected, onSelect }) {
    const box = useRef(), shownBefore = useRef(null), { arrays } = record;
    const length = arrays.input_ids.length, start = arrays.response_mask.indexOf(1), first = start < 0 ? length : start;
    const body = useMemo(() => {
      const tokens = (from, to) => Array.from({ length: to - from }, (_, i) => oneToken({ record, scale, name, wrong, place }, from + i));
      const actions = arrays.action_mask.reduce((sum, x) => sum + x, 0);
      return html`<details class="token-fold" open=${first <= LONG_PROMPT}><summary>${t("token.prompt")} <span class="muted">${t("token.promptLength", format(first))}</span></summary>
          <div class="token-run">${tokens(0, first)}</div></details>
        <h3>${t("token.response")} <span class="muted">${t("token.responseLength", format(length - first), format(actions))}</span></h3>
        <div class="token-run">${tokens(first, length)}</div>`;
    }, [record, scale, name, wrong, JSON.stringify(place)]);
    useLayoutEffect(() => {
      const token = box.current.querySelector(`[data-t="${selected}"]`);
      for (const old of box.current.querySelectorAll('[aria-current="true"]')) {
        if (old === token) continue;
        old.removeAttribute("aria-current");
        old.tabIndex = -1;
      }
      if (!token) return;
      token.setAttribute("aria-current", "true");
      token.tabIndex = 0;
      if (shownBefore.current === selected) return;
      const fold = token.closest("details");
      if (fold) fold.open = true;
      if (box.current.contains(document.activeElement)) token.focus({ preventScroll: true });
      if (shownBefore.current !== null || linked) token.scrollIntoView({ block: "nearest" });
      shownBefore.current = selected;
    }, [selected, body]);
    const pick = (event) => {
      const token = event.target.closest("a.token");
      if (!token || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      onSelect(Number(token.dataset.t));
    };
    return html`<div class="token-text" ref=${box} onClick=${pick} role="group" aria-label=${t("token.text")}>${body}</div>`;
  }

  Pellucid.tokenText = { available, scaleOf, Legend, Chart, Tokens };
})();
