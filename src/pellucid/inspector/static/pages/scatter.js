/* Proxy against KL: where over-optimisation can be seen. SVG; uPlot wants x to grow, and KL does not always. */
(() => {
  "use strict";
  const { html, t, useState, useMemo, useWidth, format, visibleText, Panel, Choice, curves: { hasValues } } = Pellucid;

  // [what is on y, what KL is on x, shape, on the right-hand scale]
  const PAIRS = [
    ["score/mean", "kl/sequence", "dot", false],
    ["eval/score", "eval/kl", "square", false],
    ["eval/judge", "eval/kl", "triangle", true],
  ];
  const MOST = 600; // points drawn per series; of more, every n-th
  const EDGE = { left: 58, right: 58, top: 12, bottom: 40 };
  const HEIGHT = 300;

  /** The series that can be drawn: points [{x, y, step}] in the order of steps; and how many a square root leaves out. */
  function collect(loaded, root) {
    let negative = 0;
    const series = loaded.flatMap(({ name: runName, columns }, r) => PAIRS.flatMap(([y, kl, shape, right], p) => {
      const x = hasValues(columns[kl]) ? kl : "kl/sequence";
      if (!hasValues(columns[y]) || !hasValues(columns[x])) return [];
      let points = columns.step.map((step, i) => ({ step, kl: columns[x][i], y: columns[y][i] }))
        .filter((q) => Number.isFinite(q.kl) && Number.isFinite(q.y));
      if (root) {
        negative += points.filter((q) => q.kl < 0).length;
        points = points.filter((q) => q.kl >= 0);
      }
      const every = Math.ceil(points.length / MOST);
      points = points.filter((_, i) => i % every === 0 || i === points.length - 1).map((q) => ({ ...q, x: root ? Math.sqrt(q.kl) : q.kl }));
      return [{ label: loaded.length > 1 ? `${runName} · ${y}` : y, against: x, points, shape, right,
        colour: `var(--series-${(loaded.length > 1 ? r : p) % 8})` }];
    }));
    return { series: series.filter(({ points }) => points.length), negative };
  }

  /** About `count` round figures that cover [low, high]. */
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }
  /** {low, high} of the values, a little wider than they are. */
  function reach(values) {
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    return { low: low - room, high: high + room };
  }

  const SHAPES = {
    dot: (x, y) => `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`,
    square: (x, y) => `M${x - 4} ${y - 4}h8v8h-8z`,
    triangle: (x, y) => `M${x} ${y - 5}l5 9h-10z`,
  };

  function Axes({ x, y, right, at, width, root }) {
    const bottom = HEIGHT - EDGE.bottom;
    return html`<g class="run-axes">
      ${ticks(y.low, y.high, 5).map((v) => html`<g key=${`y${v}`}><line x1=${EDGE.left} x2=${width - EDGE.right} y1=${at.y(v)} y2=${at.y(v)} />
        <text x=${EDGE.left - 6} y=${at.y(v) + 4} text-anchor="end">${format(v)}</text></g>`)}
      ${right && ticks(right.low, right.high, 5).map((v) => html`<text key=${`r${v}`} x=${width - EDGE.right + 6} y=${at.right(v) + 4}>
        ${format(v)}</text>`)}
      ${ticks(x.low, x.high, Math.max(3, width / 120)).map((v) => html`<text key=${`x${v}`} x=${at.x(v)} y=${bottom + 16}
        text-anchor="middle">${format(v)}</text>`)}
      <text x=${(EDGE.left + width - EDGE.right) / 2} y=${HEIGHT - 6} text-anchor="middle">${root ? "√KL (√nat)" : "KL (nat)"}</text>
    </g>`;
  }

  function Series({ one, at, mark, onPick }) {
    const y = one.right ? at.right : at.y;
    const last = one.points.at(-1);
    return html`<g>
      <polyline class="run-trail" points=${one.points.map((q) => `${at.x(q.x)},${y(q.y)}`).join(" ")} style=${{ stroke: one.colour }} />
      ${one.points.map((q) => html`<path key=${q.step} class=${`run-point ${onPick ? "run-point-picks" : ""} ${q === last ? "run-point-last" : ""}`}
        d=${SHAPES[one.shape](at.x(q.x), y(q.y))}
        style=${{ fill: q.step === mark ? "var(--fg)" : one.colour, stroke: one.colour }} onClick=${() => onPick?.(q.step)}>
        <title>${t("run.point", visibleText(one.label, 60), q.step, format(q.kl), format(q.y))}</title></path>`)}
    </g>`;
  }

  Pellucid.ProxyAgainstKL = ({ loaded, mark, onPick }) => {
    const [root, setRoot] = useState(false);
    const [box, measured] = useWidth();
    const width = Math.max(240, measured);
    const { series, negative } = useMemo(() => collect(loaded, root), [loaded, root]);
    const all = (side, key) => series.filter((s) => side === null || s.right === side).flatMap((s) => s.points.map((q) => q[key]));
    const x = reach(all(null, "x"));
    const left = all(false, "y"), judged = all(true, "y");
    const y = reach(left.length ? left : judged);
    const right = judged.length ? reach(judged) : null;
    const across = (range, from, to) => (v) => Math.round(10 * (from + ((v - range.low) / (range.high - range.low)) * (to - from))) / 10;
    const at = { x: across(x, EDGE.left, width - EDGE.right), y: across(y, HEIGHT - EDGE.bottom, EDGE.top),
      right: right && across(right, HEIGHT - EDGE.bottom, EDGE.top) };
    const choice = html`<${Choice} label=${t("run.xAxis")} value=${root} onChange=${setRoot}
      options=${[[false, t("run.linear")], [true, t("run.sqrt")]]} />`;
    return html`<${Panel} title=${t("run.proxy")} hint=${t("run.proxyHint")} actions=${choice}
      name=${`run-proxy ${series.length || negative ? "" : "run-nothing"}`}>
      <div ref=${box}>${series.length > 0 && html`<svg width=${width} height=${HEIGHT} role="img" aria-label=${t("run.proxy")}>
        <${Axes} x=${x} y=${y} right=${right} at=${at} width=${width} root=${root} />
        ${series.map((one) => html`<${Series} key=${one.label} one=${one} at=${at} mark=${mark} onPick=${onPick} />`)}
      </svg>`}</div>
      <ul class="run-legend">${series.map((one) => html`<li key=${one.label}><svg width="14" height="14" aria-hidden="true">
        <path d=${SHAPES[one.shape](7, 7)} style=${{ fill: one.colour }} /></svg>
        ${visibleText(one.label, 60)} <span class="muted">(${one.against})</span></li>`)}</ul>
      <p class="muted">${right && left.length > 0 && t("run.proxyJudge")} ${negative > 0 && t("run.proxyNegative", negative)}</p>
    <//>`;
  };
})();
