/* Samples with their full texts: those of a group side by side, and those of a prompt over the steps. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useMemo, usePayload, sampleAt, link, go, format, diverging, Visible, Panel, Failure, Empty,
    Loading, Plot } = Pellucid;
  const TEXT = 20000; // characters of a text that are shown
  const SHOWN = 24; // samples of a prompt that are fetched before being asked for more

  /** {sample, error} of a row of a step. */
  function useSample(run, step, row) {
    const key = `${run}/${step}/${row}`;
    const [answer, setAnswer] = useState({});
    useEffect(() => {
      let wanted = true;
      sampleAt(run, step, row).then(({ sample }) => wanted && setAnswer({ key, sample }), (error) => wanted && setAnswer({ key, error }));
      return () => { wanted = false; };
    }, [key]);
    return answer.key === key ? answer : {};
  }

  function Facts({ sample, limit }) {
    const fact = (name, value) => html`<span key=${name}><span class="muted">${t(`samples.col.${name}`)}</span> ${value}</span>`;
    return html`<div class="samples-facts">
      <span class="samples-score" style=${diverging(sample.scores, limit)}>${t("samples.col.scores")} ${format(sample.scores)}</span>
      ${["length", "kl_sequence", "advantage_mean", "clipped_share"].map((name) => fact(name, format(sample[name])))}
      ${fact("stop_reason", sample.stop_reason)}
    </div>`;
  }

  function Card({ run, step, row, title, limit, onSample, query, children }) {
    const { sample, error } = useSample(run, step, row);
    useEffect(() => { if (sample) onSample?.(row, step, sample); }, [sample]);
    return html`<article class="samples-card">
      <header><h3>${title}</h3>${children}<a href=${link({ run, step, page: "token", sample: row, query })}>${t("samples.tokens")}</a></header>
      ${error ? html`<${Failure} error=${error} />` : !sample ? html`<p class="muted">${t("samples.loading")}</p>`
        : html`<${Facts} sample=${sample} limit=${limit} /><div class="samples-full"><${Visible} text=${sample.response}
          limit=${TEXT} multiline /></div>`}
    </article>`;
  }

  /** Back, a number, on: through the sorted `all`. */
  function Stepper({ all, value, label, names, onChange }) {
    const button = (sign, name, target) => html`<button type="button" aria-label=${t(name)} title=${t(name)}
      disabled=${target === undefined} onClick=${() => onChange(target)}>${sign}</button>`;
    const typed = (event) => event.target.value !== "" && onChange(Number(event.target.value));
    return html`<span class="samples-stepper">
      ${button("◀", names[0], all.findLast((n) => n < value))}
      <label>${label} <input type="number" value=${value} min=${all[0]} max=${all.at(-1)} aria-label=${label} onChange=${typed} /></label>
      ${button("▶", names[1], all.find((n) => n > value))}
    </span>`;
  }

  const largest = (values) => values.reduce((most, v) => (Number.isFinite(v) ? Math.max(most, Math.abs(v)) : most), 0);

  function Prompt({ run, step, row }) {
    const { sample } = useSample(run, step, row);
    return sample ? html`<div class="samples-full samples-asked"><span class="muted">${t("samples.col.prompt")}</span> <${Visible}
      text=${sample.prompt} limit=${TEXT} multiline /></div>` : null;
  }

  Pellucid.Groups = ({ runId, step, samples, query, put }) => {
    const { columns } = samples;
    const groups = useMemo(() => [...new Set(columns.group_ids)].sort((a, b) => a - b), [samples]);
    const group = query.group !== undefined ? Number(query.group) : groups[0];
    const rows = columns.group_ids.map((id, i) => (id === group ? i : -1)).filter((i) => i >= 0)
      .sort((a, b) => columns.scores[b] - columns.scores[a] || a - b);
    const elsewhere = link({ run: runId, step, page: "samples", query: { view: "prompt", prompt: columns.prompt_id[rows[0]] } });
    const scores = rows.map((i) => columns.scores[i]);
    const limit = useMemo(() => largest(columns.scores), [samples]);
    const head = rows.length === 1 ? t("samples.groupOf1", group, format(scores[0]))
      : t("samples.groupOf", group, rows.length, format(scores.at(-1)), format(scores[0]), format(scores.reduce((a, b) => a + b, 0) / scores.length));
    return html`<${Panel} actions=${html`<${Stepper} all=${groups} value=${group} label=${t("samples.group")}
      names=${["samples.previousGroup", "samples.nextGroup"]} onChange=${(g) => put({ group: g })} />`}>
      ${!rows.length ? html`<${Empty}>${t("samples.noGroup", String(query.group))}<//>` : html`
        <h3>${head}</h3>
        ${groups.length === samples.rows && html`<p class="muted">${t("samples.groupSingle")}</p>`}
        <${Prompt} run=${runId} step=${step} row=${rows[0]} />
        <p><a href=${elsewhere}>${t("samples.elsewhere")}</a></p>
        <div class="samples-cards">${rows.map((row) => html`<${Card} key=${`${step}/${row}`} run=${runId} step=${step} row=${row}
          limit=${limit} title=${t("samples.sampleOf", columns.sample_index[row])} />`)}</div>`}
    <//>`;
  };

  function Across({ run, prompt, places }) {
    const [count, setCount] = useState(SHOWN);
    const [seen, setSeen] = useState({});
    const shown = places.slice(-count);
    const known = shown.map(([step, row]) => ({ step, score: seen[`${step}/${row}`]?.scores })).filter(({ score }) => Number.isFinite(score));
    const limit = largest(known.map(({ score }) => score));
    const scores = [{ label: t("samples.scoreBySteps"), ...meanByStep(known), points: true }];
    const series = useMemo(() => scores, [JSON.stringify(known), Pellucid.language]);
    const steps = new Set(places.map(([step]) => step)).size;
    const titleOf = (step, row) => {
      const sample = places.length > steps ? seen[`${step}/${row}`] : null; // a group has several samples at a step
      return sample ? `${t("samples.atStep", step)} · ${t("samples.sampleOf", sample.sample_index)}` : t("samples.atStep", step);
    };
    const [lastStep, lastRow] = places.at(-1);
    return html`<h3>${steps === 1 ? t("samples.promptSeen1", prompt) : t("samples.promptSeen", prompt, steps)}</h3>
      <${Prompt} run=${run} step=${lastStep} row=${lastRow} />
      ${series[0].x.length > 1 && html`<${Plot} series=${series} height=${150} xLabel=${t("shell.step")}
        onPick=${(step) => go(link({ run, step, page: "step" }))} label=${t("samples.scoreBySteps")} />`}
      ${places.length > count && html`<button type="button" onClick=${() => setCount(count + SHOWN)}>
        ${t("samples.earlier", Math.min(SHOWN, places.length - count))}</button>`}
      <div class="samples-column">${shown.map(([step, row]) => html`<${Card} key=${`${step}/${row}`} run=${run} step=${step} row=${row}
        limit=${limit} title=${titleOf(step, row)}
        onSample=${(r, s, sample) => setSeen((old) => ({ ...old, [`${s}/${r}`]: sample }))} />`)}</div>`;
  }
  /** {x: steps, y: mean score}: a group has several samples at a step. */
  function meanByStep(known) {
    const sums = new Map();
    for (const { step, score } of known) {
      const [sum, n] = sums.get(step) ?? [0, 0];
      sums.set(step, [sum + score, n + 1]);
    }
    const x = [...sums.keys()].sort((a, b) => a - b);
    return { x, y: x.map((step) => sums.get(step)[0] / sums.get(step)[1]) };
  }

  Pellucid.PromptOverSteps = ({ runId, state, samples, query, put }) => {
    const { data, error } = usePayload(`run/${runId}/prompts.json`, state.revision);
    const all = useMemo(() => Object.keys(data?.prompts ?? {}).map(Number).sort((a, b) => a - b), [data]);
    if (error && !data) return html`<${Failure} error=${error} />`;
    if (!data) return html`<${Loading} />`;
    const prompt = query.prompt !== undefined ? Number(query.prompt) : samples?.columns.prompt_id[Number(query.at) || 0] ?? all[0];
    const places = [...(data.prompts[String(prompt)] ?? [])].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const stepper = html`<${Stepper} all=${all} value=${prompt} label=${t("samples.promptNumber")}
      names=${["samples.previousPrompt", "samples.nextPrompt"]} onChange=${(n) => put({ prompt: n })} />`;
    return html`<${Panel} actions=${stepper}>${places.length ? html`<${Across} key=${prompt} run=${runId} prompt=${prompt}
      places=${places} />` : html`<${Empty}>${t("samples.noPrompt", String(prompt))}<//>`}<//>`;
  };
})();
