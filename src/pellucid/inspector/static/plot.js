/* Curves over steps, drawn by uPlot. */
(() => {
  "use strict";
  const { html, t, useEffect, useRef, format, cssValue, seriesStyle, visibleText } = Pellucid;

  /** One table for uPlot from series with x of their own. A null y stays a gap; an x that a series lacks does not. */
  function joined(series) {
    if (!series.length) return [[]];
    return uPlot.join(series.map(({ x, y }) => [x, y.map((v) => (Number.isFinite(v) ? v : null))]));
  }

  function axis(label, extra) {
    return {
      label, labelSize: 18, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif",
      stroke: () => cssValue("--muted"), grid: { stroke: () => cssValue("--line"), width: 1 }, ticks: { show: false }, ...extra,
    };
  }

  const colourOf = (one, i) => one?.colour ?? seriesStyle(i).colour;

  /** Series that are drawn but not listed under the plot: the smoothed twin of a measured one. */
  function unlist(u, series) {
    const rows = u.root.querySelectorAll(".u-legend .u-series");
    series.forEach((one, i) => { if (one.unlisted && rows[i + 1]) rows[i + 1].hidden = true; });
  }

  function oneSeries(one, i) {
    const { label, dash, faint, width = 1.75, points } = one;
    const stroke = () => cssValue(colourOf(one, i)) + (faint ? "66" : "");
    return {
      label: visibleText(label, 60), stroke, width: faint ? 1 : width, dash: dash ?? seriesStyle(i).dash,
      points: points ? { show: true, size: 6, fill: stroke } : { size: 5 },
      value: (_, v) => format(v),
    };
  }

  /** The y to show; of a constant, a little around it. */
  function range(u, low, high) {
    if (low === null || low === undefined) return [null, null];
    if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, low + Math.abs(low) * 0.1];
    return uPlot.rangeNum(low, high, 0.1, true);
  }

  const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6]; // between two ticks: whole steps

  function options({ series, xLabel, yLabel, height, log, mark }, onPick) {
    return {
      width: 300, height, padding: [10, 26, 0, 4],
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
      axes: [
        axis(xLabel, { size: 32, incrs: STEPS, values: (_, all) => all.map(format) }),
        axis(yLabel, { size: 58, values: (_, all) => all.map((v) => (v === null ? "" : format(v))) }),
      ],
      legend: { markers: {
        stroke: (u, i) => cssValue(colourOf(series[i - 1], i - 1)),
        dash: (u, i) => (series[i - 1]?.dash?.length ? "dashed" : "solid"),
      } },
      series: [{ label: xLabel, value: (_, v) => format(v) }, ...series.map(oneSeries)],
      hooks: { ready: [(u) => listenForPicks(u, onPick), (u) => unlist(u, series)], draw: [(u) => drawMark(u, mark())],
        setCursor: [(u) => rest(u, mark())] },
    };
  }

  /** A click, not the end of a drag that zooms, picks the x nearest to the cursor. */
  function listenForPicks(u, onPick) {
    let pressedAt = 0;
    u.over.addEventListener("mousedown", (event) => { pressedAt = event.clientX; });
    u.over.addEventListener("click", (event) => {
      if (Math.abs(event.clientX - pressedAt) < 4 && u.cursor.idx !== null && u.cursor.idx !== undefined) onPick()?.(u.data[0][u.cursor.idx]);
    });
  }

  /** While no step is pointed at, the legend holds the values of the step that is open, else of the last. */
  function rest(u, x) {
    if (u.cursor.left >= 0 || !u.data[0].length) return;
    const at = u.data[0].indexOf(x);
    u.setLegend({ idx: at < 0 ? u.data[0].length - 1 : at });
  }

  /** A vertical line at `x`: the step that is open. */
  function drawMark(u, x) {
    if (x === null || x === undefined || x < u.scales.x.min || x > u.scales.x.max) return;
    const at = Math.round(u.valToPos(x, "x", true));
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = cssValue("--accent");
    ctx.setLineDash([3, 3]);
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  /** Curves: series [{label, x, y, dash?, colour? ("--name"), faint?, points?, unlisted?}], y in null where not defined. onPick(x): a click.
   *  A logarithmic y leaves out what is not above 0. */
  function Plot({ series, xLabel, yLabel, height = 220, log = false, mark = null, onPick = null, label }) {
    const box = useRef();
    const drawn = useRef(null);
    const latest = useRef({});
    latest.current = { mark, onPick };
    const shape = JSON.stringify([series.map((s) => [s.label, s.faint, s.colour, s.dash, s.points]), xLabel, yLabel, height, log, Pellucid.isDark()]);
    const table = () => joined(log ? series.map((s) => ({ ...s, y: s.y.map((v) => (v > 0 ? v : null)) })) : series);

    useEffect(() => {
      const make = options({ series, xLabel, yLabel, height, log, mark: () => latest.current.mark }, () => latest.current.onPick);
      const u = new uPlot(make, table(), box.current);
      drawn.current = u;
      const fit = () => u.setSize({ width: Math.max(120, box.current.clientWidth), height });
      const watcher = new ResizeObserver(fit);
      watcher.observe(box.current);
      fit();
      return () => { watcher.disconnect(); u.destroy(); drawn.current = null; };
    }, [shape]);
    useEffect(() => {
      const u = drawn.current;
      if (!u) return;
      const before = u.data[0];
      const zoomed = before.length > 1 && u.scales.x.min !== null && (u.scales.x.min > before[0] || u.scales.x.max < before[before.length - 1]);
      u.setData(table(), !zoomed);
      if (zoomed) u.redraw();
      rest(u, mark);
    }, [series, mark]);
    const last = series.map((s) => `${s.label}: ${format(s.y.findLast((v) => Number.isFinite(v)))}`).join("; ");
    return html`<div class=${`plot ${onPick ? "plot-picks" : ""}`} ref=${box} role="img"
      aria-label=${t("shell.plotLabel", visibleText(label ?? yLabel, 60), visibleText(last, 300))}></div>`;
  }

  Object.assign(Pellucid, { Plot });
})();
