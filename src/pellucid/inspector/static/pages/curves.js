/* Metrics as curves: which belong together, smoothing, and several runs in one picture. */
(() => {
  "use strict";
  const { html, t, useMemo, Term, Visible, Panel, Plot } = Pellucid;

  // What is shown without being asked for, in this order; a group appears where any of its metrics does.
  const GROUPS = [
    ["score", ["score/mean", "eval/score", "eval/judge"]], ["kl", ["kl/sequence"]], ["entropy", ["policy/entropy"]], ["length", ["rollout/length"]],
    ["clip", ["actor/clip_fraction", "critic/clip_fraction"]], ["variance", ["critic/explained_variance"]], ["valueLoss", ["critic/value_loss"]],
    ["nll", ["train/nll", "eval/nll"]], ["pairLoss", ["train/pair_loss", "eval/pair_loss"]], ["accuracy", ["train/accuracy", "eval/accuracy"]],
    ["margin", ["train/margin", "eval/margin"]], ["gradNorm", ["optimizer/grad_norm"]], ["lr", ["actor/lr", "critic/lr", "optimizer/lr"]],
      ["time", /^time\//],
  ];
  const FALLBACK = 8; // metrics shown of a run that has none of the above

  const hasValues = (column) => column?.some(Number.isFinite);
  /** Names of the metrics that any of the runs has, sorted. */
  function metricNames(loaded) {
    const names = new Set();
    for (const { columns } of loaded) for (const name of Object.keys(columns)) if (name !== "step" && hasValues(columns[name])) names.add(name);
    return [...names].sort();
  }

  /** [[title, names]] of the pictures to draw: the groups, then each metric asked for. */
  function pictures(names, wanted) {
    const present = (members) => (members instanceof RegExp ? names.filter((n) => members.test(n)) : members.filter((n) => names.includes(n)));
    const grouped = GROUPS.map(([title, members]) => [t(`run.group.${title}`), present(members)])
      .filter(([, members]) => members.length);
    const usual = grouped.length ? grouped : names.slice(0, FALLBACK).map((name) => [name, [name]]);
    const shown = new Set(usual.flatMap(([, members]) => members.length === 1 ? members : []));
    return usual.concat(wanted.filter((name) => names.includes(name) && !shown.has(name)).map((name) => [name, [name]]));
  }

  /** Exponential moving average that starts at the first value and not at 0; what is not defined stays so and is passed over. */
  function smoothed(values, keep) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (!Number.isFinite(value)) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  /** Evaluations happen every so many steps: the steps between are not gaps, they were not asked. */
  const isSparse = (name) => name.startsWith("eval/");
  function defined(x, y) {
    const kept = x.map((_, i) => i).filter((i) => Number.isFinite(y[i]));
    return { x: kept.map((i) => x[i]), y: kept.map((i) => y[i]) };
  }

  const MARKED = 80; // evaluations of which each has its mark
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
  /** The curves of one picture. One run: a colour per metric. Several: a colour per run, a dash per metric. */
  function curves(loaded, names, keep) {
    const several = loaded.length > 1;
    const series = [];
    loaded.forEach(({ name: runName, columns }, r) => names.forEach((name, m) => {
      if (!hasValues(columns[name])) return;
      const style = { colour: `--series-${(several ? r : m) % 8}`, dash: DASHES[(several ? m : Math.floor(m / 8)) % 4] };
      const label = several ? `${runName} · ${name}` : name;
      if (isSparse(name)) {
        const measured = defined(columns.step, columns[name]);
        series.push({ label, ...measured, ...style, dash: [4, 4], points: measured.x.length <= MARKED });
      } else if (keep > 0 && columns[name].length > 2) {
        series.push({ label, x: columns.step, y: columns[name], ...style, faint: true });
        series.push({ label, x: columns.step, y: smoothed(columns[name], keep), ...style, unlisted: true });
      } else series.push({ label, x: columns.step, y: columns[name], ...style, points: columns[name].length < 3 });
    }));
    return series;
  }

  function Picture({ title, names, loaded, keep, log, mark, onPick }) {
    const series = useMemo(() => curves(loaded, names, keep), [loaded, names.join(), keep]);
    const alone = names.length === 1 && names[0] === title;
    const head = alone ? html`<${Term} name=${title}><${Visible} text=${title} limit=${60} /><//>`
      : html`${title} <span class="run-names">${names.length <= 3 && names.map((name) => html`<${Term} key=${name} name=${name} /> `)}</span>`;
    return html`<${Panel} title=${head} name="run-picture">
      <${Plot} series=${series} xLabel=${t("run.stepAxis")} height=${190} log=${log} mark=${mark} onPick=${onPick} label=${title} />
    <//>`;
  }

  Pellucid.curves = { metricNames, pictures, smoothed, defined, hasValues, Picture };
})();
