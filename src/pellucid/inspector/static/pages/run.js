/* The page of a run: curves, proxy against KL, figures, configuration; several runs over one another. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useMemo, useRef, source, link, go, useKeys, format, seconds, visibleText, Panel, Failure, Loading,
    Empty, Hint, Term, Visible } = Pellucid;
  const { metricNames, pictures, hasValues, Picture } = Pellucid.curves;

  const listed = (text) => (text || "").split(",").filter(Boolean);

  /** [{id, name, columns, config}] of the runs in view, as they arrive, and what failed. A new revision of the first asks for all again. */
  function useLoaded(ids, runs, revision) {
    const [answer, setAnswer] = useState({ key: null, loaded: null, failed: [] });
    const key = ids.join();
    useEffect(() => {
      let wanted = true;
      const one = async (id) => {
        const name = runs.find((run) => run.id === id)?.name ?? id;
        const [metrics, config] = await Promise.all([
          source.get(`run/${id}/metrics.json`),
          source.get(`run/${id}/config.json`, revision).catch(() => null),
        ]);
        return { id, name, columns: { step: [], ...metrics.columns }, config };
      };
      Promise.allSettled(ids.map(one)).then((all) => {
        if (!wanted) return;
        const loaded = all.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
        const failed = all.flatMap(({ reason }, i) => (reason ? [{ id: ids[i], error: reason }] : []));
        setAnswer((old) => ({ key, loaded: loaded.length || old.key !== key ? loaded : old.loaded, failed }));
      });
      return () => { wanted = false; };
    }, [key, revision]);
    return answer;
  }

  // ------------------------------------------------------------------ controls
  function Picker({ names, wanted, onChange, box }) {
    const [text, setText] = useState("");
    const matching = names.filter((name) => name.toLowerCase().includes(text.toLowerCase()));
    const toggle = (name) => onChange(wanted.includes(name) ? wanted.filter((n) => n !== name) : [...wanted, name]);
    return html`<details class="run-picker">
      <summary>${t("run.allMetrics")} <span class="muted">${wanted.length > 0 && t("run.shownOf", wanted.length, names.length)}</span></summary>
      <input ref=${box} type="search" value=${text} placeholder=${t("run.findMetric")} aria-label=${t("run.findMetric")}
        onInput=${(event) => setText(event.target.value)} />
      <div class="run-choices">${matching.length === 0 && html`<span class="muted">${t("run.none")}</span>`}
        ${matching.map((name) => html`<label key=${name}><input type="checkbox" checked=${wanted.includes(name)}
          onChange=${() => toggle(name)} /><${Term} name=${name}><${Visible} text=${name} limit=${60} /><//></label>`)}
      </div>
    </details>`;
  }

  function Compare({ runs, runId, others, onChange }) {
    if (runs.length < 2) return null;
    const toggle = (id) => onChange(others.includes(id) ? others.filter((o) => o !== id) : [...others, id]);
    return html`<div class="run-compare" role="group" aria-label=${t("run.compare")}><span>${t("run.compare")}</span>
      ${runs.filter(({ id }) => id !== runId).map(({ id, name, path }) => html`<label key=${id} title=${visibleText(path, 200)}>
        <input type="checkbox" checked=${others.includes(id)} onChange=${() => toggle(id)} />${visibleText(name, 40)}</label>`)}
    </div>`;
  }

  function Controls({ query, put, keep }) {
    const [shown, setShown] = useState(keep);
    const timer = useRef();
    useEffect(() => setShown(keep), [keep]);
    const slide = (event) => {
      const value = Number(event.target.value);
      setShown(value);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => put({ smooth: value }), 150);
    };
    return html`<div class="run-controls">
      <label><${Hint} text=${t("run.smoothingHint")}>${t("run.smoothing")}<//>
        <input type="range" min="0" max="0.95" step="0.05" value=${shown} aria-label=${t("run.smoothing")} onInput=${slide} />
        <output class="mono">${shown.toFixed(2)}</output></label>
      <label><input type="checkbox" checked=${query.log === "1"}
        onChange=${(event) => put({ log: event.target.checked ? 1 : null })} /><${Hint} text=${t("run.logHint")}>${t("run.log")}<//></label>
    </div>`;
  }

  // ------------------------------------------------------------------ figures
  /** First, last, lowest and highest value of a column, each with its step. */
  function figures(steps, column) {
    let first = null, last = null, low = null, high = null;
    column.forEach((value, i) => {
      if (!Number.isFinite(value)) return;
      const here = { value, step: steps[i] };
      first ??= here;
      last = here;
      if (!low || value < low.value) low = here;
      if (!high || value > high.value) high = here;
    });
    return [first, last, low, high];
  }

  function Figures({ loaded, names, mark }) {
    const several = loaded.length > 1;
    const cell = (here, i) => html`<td key=${i} class="number">${format(here.value)} <span class="muted">${t("run.atStep", here.step)}</span></td>`;
    const marked = (columns, name) => columns[name][columns.step.indexOf(mark)];
    const row = (name, { id, name: runName, columns }) => html`<tr key=${`${name} ${id}`}>
      <th scope="row"><${Term} name=${name}><${Visible} text=${name} limit=${60} /><//></th>${several && html`<td>${visibleText(runName, 30)}</td>`}
      ${mark !== null && html`<td class="number">${format(marked(columns, name))}</td>`}
      ${figures(columns.step, columns[name]).map(cell)}</tr>`;
    const rows = names.flatMap((name) => loaded.filter(({ columns }) => hasValues(columns[name])).map((one) => row(name, one)));
    return html`<${Panel} title=${t("run.figures")} name="run-figures"><div class="scroll-x" tabindex="0"><table>
      <thead><tr><th>${t("run.metric")}</th>${several && html`<th>${t("run.runColumn")}</th>`}
        ${mark !== null && html`<th class="number">${t("run.atStep", mark)}</th>`}
        ${["firstValue", "lastValue", "lowest", "highest"].map((name) => html`<th key=${name} class="number">${t(`run.${name}`)}</th>`)}</tr></thead>
      <tbody>${rows}</tbody></table></div><//>`;
  }

  function Summary({ loaded }) {
    const keys = [...new Set(loaded.flatMap(({ config }) => Object.keys(config?.summary ?? {})))];
    const show = (key, value) => {
      if (typeof value === "number") return key === "seconds" ? seconds(value) : format(value);
      return value === undefined ? "–" : html`<${Visible} text=${typeof value === "string" ? value : JSON.stringify(value)} limit=${200} />`;
    };
    return html`<${Panel} title=${t("run.summary")} name="run-summary">${keys.length === 0 ? html`<${Empty}>${t("run.noSummary")}<//>`
      : html`<div class="scroll-x" tabindex="0"><table>
        ${loaded.length > 1 && html`<thead><tr><th></th>${loaded.map(({ id, name }) => html`<th key=${id}>
          ${visibleText(name, 30)}</th>`)}</tr></thead>`}
        <tbody>${keys.map((key) => html`<tr key=${key}><th scope="row"><${Visible} text=${key} limit=${60} /></th>
          ${loaded.map(({ id, config }) => html`<td key=${id}>${show(key, config?.summary?.[key])}</td>`)}</tr>`)}</tbody></table></div>`}<//>`;
  }

  // ------------------------------------------------------------------ page
  function Metrics({ loaded, names, query, put, steps, runId, mark }) {
    const wanted = listed(query.metrics);
    const keep = Math.min(0.95, Math.max(0, Number(query.smooth ?? 0.5) || 0));
    const nearest = (x) => steps.reduce((best, s) => (Math.abs(s - x) < Math.abs(best - x) ? s : best), steps[0]);
    const open = (x) => go(link({ run: runId, page: "step", step: nearest(x) }));
    const onPick = steps.length ? open : null;
    const filter = useRef();
    useKeys({ "/": () => {
      filter.current.closest("details").open = true;
      filter.current.focus();
    } });
    return html`<section class="run-metrics">
      <div class="run-bar"><h2>${t("run.curves")}</h2><${Controls} query=${query} put=${put} keep=${keep} />
        <span class="muted">${steps.length ? t("run.click") : t("run.clickNone")} ${t("run.zoom")}</span></div>
      <${Picker} names=${names} wanted=${wanted} box=${filter} onChange=${(metrics) => put({ metrics: metrics.join() })} />
      <div class="run-grid">${pictures(names, wanted).map(([title, members]) => html`<${Picture} key=${title + members[0]} title=${title}
        names=${members} loaded=${loaded}
        keep=${keep} log=${query.log === "1"} mark=${mark} onPick=${onPick} />`)}</div>
      <${Pellucid.ProxyAgainstKL} loaded=${loaded} mark=${mark} onPick=${onPick} />
    </section>`;
  }

  Pellucid.pages.run = ({ runId, step, state, route, runs }) => {
    const { query } = route;
    const others = listed(query.with).filter((id) => id !== runId && runs.some((run) => run.id === id));
    const { loaded, failed } = useLoaded([runId, ...others], runs, state.revision);
    const names = useMemo(() => metricNames(loaded ?? []), [loaded]);
    const put = (changes) => go(link({ run: runId, page: "run", query: { ...query, ...changes } }), { replace: true });
    const nameOf = (id) => visibleText(runs.find((run) => run.id === id)?.name ?? id, 40);
    if (!loaded) return html`<${Loading} />`;
    const shown = [...new Set(pictures(names, listed(query.metrics)).flatMap(([, members]) => members))];
    return html`<div class="run">
      ${failed.map(({ id, error }) => html`<${Failure} key=${id} error=${t("run.compareFailed", nameOf(id), error.message)} />`)}
      <${Compare} runs=${runs} runId=${runId} others=${others} onChange=${(ids) => put({ with: ids.join() })} />
      ${names.length === 0 ? html`<${Panel}><${Empty}>${t("run.noMetrics")}<//><//>`
        : html`<${Metrics} loaded=${loaded} names=${names} query=${query} put=${put} steps=${state.steps} runId=${runId} mark=${step} />`}
      <div class="run-tables">
        ${names.length > 0 && html`<${Figures} loaded=${loaded} names=${shown} mark=${step} />`}
        <${Summary} loaded=${loaded} />
        <${Pellucid.Config} loaded=${loaded} />
      </div>
    </div>`;
  };
})();
