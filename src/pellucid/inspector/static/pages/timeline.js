/* Where the seconds of one step went: phases on a time axis, a table, and what token by token costs against all at once. */
(() => {
  "use strict";
  const { html, t, useState, format, seconds, stepFacts } = Pellucid;
  const LANE = 34, BAR = 22, AXIS = 24; // px
  const KINDS = ["token by token", "all at once", "update", "driver"];
  const slug = (kind) => (KINDS.includes(kind) ? kind.replaceAll(" ", "-") : "driver");
  const kindText = (kind) => (Pellucid.hasText(`step.kind.${kind}`) ? t(`step.kind.${kind}`) : kind || "–");
  const percent = (share) => (Number.isFinite(share) ? `${format(Number((100 * share).toPrecision(3)))} %` : "–");
  const laneOf = (span) => `${span.role}/${span.rank}`;

  /** About n ticks from 0 to `whole`, 1, 2 or 5 times a power of ten apart. */
  function ticksOf(whole, n) {
    if (!(whole > 0)) return [0];
    const rough = whole / n;
    const power = 10 ** Math.floor(Math.log10(rough));
    const apart = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    return Array.from({ length: Math.floor(whole / apart + 1e-9) + 1 }, (_, i) => i * apart);
  }

  /** Stripes, plain, hatching, dots: the kinds are told apart without colour. */
  const Patterns = () => html`<defs>
    <pattern id="step-token-by-token" width="5" height="5" patternUnits="userSpaceOnUse"><rect class="step-ground" width="5" height="5" /><rect class="step-ink" width="2" height="5" /></pattern>
    <pattern id="step-update" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="step-ground" width="6" height="6" /><rect class="step-ink" width="2.2" height="6" /></pattern>
    <pattern id="step-driver" width="5" height="5" patternUnits="userSpaceOnUse"><rect class="step-ground" width="5" height="5" /><circle class="step-ink" cx="2.5" cy="2.5" r="1.1" /></pattern>
  </defs>`;

  function spanText(span, whole) {
    const parts = [t("step.time.bar", span.name, laneOf(span), kindText(span.kind), seconds(span.seconds), percent(span.seconds / whole)),
      t("step.time.from", seconds(span.start), seconds(span.start + span.seconds))];
    if (span.tokens > 0) parts.push(t("step.fact.tokens", format(span.tokens)));
    if (hasRate(span)) parts.push(t("step.fact.rate", format(Math.round(span.tokens / span.seconds))));
    return parts.join(" · ");
  }
  /** The driver runs no model: a rate of its tokens would say nothing. */
  const hasRate = ({ kind, tokens, seconds: s }) => kind !== "driver" && tokens > 0 && s > 0;

  function Bar({ span, x, y, width, name, text, onLook }) {
    return html`<g class=${`step-span step-kind-${slug(span.kind)}`} role="img" tabindex="0" aria-label=${text}
        onMouseEnter=${() => onLook(text)} onMouseLeave=${() => onLook(null)} onFocus=${() => onLook(text)} onBlur=${() => onLook(null)} onClick=${() => onLook(text)}>
      <rect class="step-span-box" x=${x} y=${y} width=${width} height=${BAR} rx=${Math.min(4, width / 2)} />
      ${name && html`<text class="step-span-name" x=${name.x} y=${y + 15} text-anchor=${name.anchor}>${span.name}</text>`}
    </g>`;
  }
  /** Where a bar's name fits: on it, right of it, or left of it in its lane; null where it does not. */
  function namePlace({ span, x, width }, lane, end) {
    const size = Pellucid.stepMeasure(span.name, `600 11.5px ${getComputedStyle(document.body).fontFamily}`) + 12;
    if (size <= width) return { x: x + 6, anchor: "start" };
    const after = Math.min(end, ...lane.filter((other) => other.x > x).map((other) => other.x));
    if (x + width + size <= after) return { x: x + width + 6, anchor: "start" };
    const before = Math.max(0, ...lane.filter((other) => other.x < x).map((other) => other.x + other.width + 100)); // 100: that one's own name
    return x - size >= before ? { x: x - 6, anchor: "end" } : null;
  }

  function Chart({ index, step, width }) {
    const [looked, setLooked] = useState(null);
    const { spans } = index;
    const { whole } = stepFacts.coverage(spans);
    const first = Math.min(...spans.map((span) => span.start));
    const lanes = [...new Set([...spans].sort((a, b) => a.start - b.start).map(laneOf))];
    const narrow = width < 560;
    const left = narrow ? 0 : 104;
    const lane = narrow ? LANE + 16 : LANE;
    const scale = (s) => left + ((s - first) / (whole || 1)) * (width - left - 1);
    const top = (span) => lanes.indexOf(laneOf(span)) * lane + (narrow ? 18 : (LANE - BAR) / 2);
    const height = lanes.length * lane + AXIS;
    const ticks = ticksOf(whole, narrow ? 3 : 6);
    const bars = spans.map((span) => ({ span, x: scale(span.start), width: Math.max(2, scale(span.start + span.seconds) - scale(span.start)) }));
    const laneBars = (span) => bars.filter((bar) => laneOf(bar.span) === laneOf(span));
    return html`<svg class="step-timeline" width=${width} height=${height} role="group" aria-label=${t("step.time.label", step, seconds(whole))}>
        <${Patterns} />
        ${ticks.map((tick) => html`<g key=${tick} class="step-tick" aria-hidden="true">
          <line x1=${scale(first + tick)} x2=${scale(first + tick)} y1="0" y2=${height - AXIS + 4} />
          <text x=${scale(first + tick)} y=${height - 6} text-anchor=${tick === 0 ? "start" : scale(first + tick) > width - 24 ? "end" : "middle"}>${seconds(Number(tick.toPrecision(6)))}</text></g>`)}
        ${lanes.map((name, i) => html`<g key=${name}>
          <line class="step-lane" x1="0" x2=${width} y1=${(i + 1) * lane} y2=${(i + 1) * lane} />
          <text class="step-lane-name" x="0" y=${i * lane + (narrow ? 13 : LANE / 2 + 4)}>${name}</text></g>`)}
        ${bars.map((bar, i) => html`<${Bar} key=${i} ...${bar} y=${top(bar.span)} onLook=${setLooked}
          name=${namePlace(bar, laneBars(bar.span), width)} text=${spanText(bar.span, whole)} />`)}
      </svg>
      <p class="step-looked" aria-live="polite">${looked ?? html`<span class="muted">${t("step.time.choose")}</span>`}</p>`;
  }

  function Kinds({ spans }) {
    return html`<ul class="step-legend">${KINDS.filter((kind) => spans.some((span) => span.kind === kind)).map((kind) => html`<li key=${kind}>
      <svg width="30" height="16" aria-hidden="true"><g class=${`step-span step-kind-${slug(kind)}`}><rect class="step-span-box" x="0.5" y="0.5" width="29" height="15" rx="3" /></g></svg>
      <${Pellucid.Hint} text=${t(`step.kind.hint.${kind}`)}>${kindText(kind)}<//></li>`)}</ul>`;
  }

  function Where({ index }) {
    const { whole, covered } = stepFacts.coverage(index.spans);
    const share = (x) => (whole > 0 ? x / whole : NaN);
    const row = (phase) => html`<tr key=${`${phase.phase} ${phase.role}`}>
      <th scope="row"><code>${phase.phase}</code></th><td>${phase.role}</td><td>${kindText(phase.kind)}</td>
      <td class="number">${seconds(phase.seconds)}</td>
      <td class="number"><span class="step-share" aria-hidden="true"><i style=${{ width: `${Math.min(100, 100 * (share(phase.seconds) || 0))}%` }}></i></span>${percent(share(phase.seconds))}</td>
      <td class="number">${format(phase.tokens)}</td>
      <td class="number">${hasRate(phase) ? format(Math.round(phase.rate)) : "–"}</td></tr>`;
    const sum = (name, s) => html`<tr class="step-sum"><th scope="row" colspan="3">${name}</th><td class="number">${seconds(s)}</td><td class="number">${percent(share(s))}</td><td></td><td></td></tr>`;
    return html`<h3>${t("step.time.where")}</h3>
      <div class="scroll-x" tabindex="0" role="region" aria-label=${t("step.time.where")}><table class="step-table">
        <thead><tr>${["phase", "role", "kind"].map((f) => html`<th scope="col" key=${f}>${t(`step.field.${f}`)}</th>`)}
          ${["seconds", "share", "tokens", "rate"].map((f) => html`<th scope="col" class="number" key=${f}>
            ${f === "tokens" ? html`<${Pellucid.Hint} text=${t("step.time.tokens")}>${t("step.field.tokens")}<//>` : t(`step.field.${f}`)}</th>`)}</tr></thead>
        <tbody>${index.phases.map(row)}${sum(t("step.time.rest"), Math.max(0, whole - covered))}${sum(t("step.time.total"), whole)}</tbody>
      </table></div>`;
  }

  function roleList(roles) {
    const names = roles.map((role) => (Pellucid.hasText(`step.node.${role}`) ? t(`step.node.${role}`) : role));
    return names.length < 2 ? names.join("") : names.slice(0, -1).join(t("step.time.comma")) + t("step.time.and") + names.at(-1);
  }
  function Comparison({ index }) {
    const found = stepFacts.comparison(index.phases);
    if (!found) return null;
    const times = found.once / found.generation;
    const rate = (x) => format(Math.round(x));
    return html`<p class="step-compare">${t(times > 1 ? "step.time.compare" : "step.time.compareSlower",
      rate(found.generation), roleList(found.roles), rate(found.once), format(Number(times.toPrecision(2))))}</p>`;
  }

  function Timeline({ index, step }) {
    const [frame, width] = Pellucid.useWidth();
    if (!index.spans.length) return html`<div ref=${frame}><${Pellucid.Empty}>${t("step.time.none")}<//></div>`;
    return html`<div ref=${frame}><${Kinds} spans=${index.spans} />${width > 0 && html`<${Chart} index=${index} step=${step} width=${width} />`}</div>
      <${Comparison} index=${index} /><${Where} index=${index} />`;
  }

  Object.assign(Pellucid, { StepTimeline: Timeline, kindText });
})();
