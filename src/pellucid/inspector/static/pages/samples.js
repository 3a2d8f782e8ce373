/* The page of a step's samples: a table that sorts and filters, groups side by side, one prompt across steps. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useLayoutEffect, useMemo, useRef, usePayload, link, go, parseRoute, useKeys, format, diverging,
    sequential, Visible, Panel, Failure, Loading, Empty, Hint, Choice, explain } = Pellucid;
  const { QUANTITIES, CHARACTERS, bounds, order } = Pellucid.samplesQuery;
  const HEIGHT = 32; // px of a row, as in css/samples.css
  const SPARE = 8; // rows drawn above and below what is seen

  const COLUMNS = ["row", "group_ids", "prompt", "response", "scores", "length", "kl_sequence", "advantage_mean", "reward_sum",
    "entropy_mean", "clipped_share", "stop_reason", "minibatch"];
  const TEXTS = new Set(["prompt", "response", "stop_reason"]);
  const upwards = (x, limit) => sequential(x, 0, limit);
  const PAINT = { scores: diverging, advantage_mean: diverging, kl_sequence: upwards, clipped_share: upwards };
  const largest = (values) => values.reduce((most, v) => (Number.isFinite(v) ? Math.max(most, Math.abs(v)) : most), 0);
  /** Three digits are enough to scan by, and fit. */
  const short = (x) => format(Number.isFinite(x) && !Number.isInteger(x) ? Number(x.toPrecision(3)) : x);
  const label = (name) => t(`samples.col.${name}`);
  const FILTERS = ["text", "stop", "group", ...QUANTITIES.flatMap((name) => [`${name}.min`, `${name}.max`])];

  // ------------------------------------------------------------------ filters
  /** An input whose value goes to the hash a moment after the last key. */
  function Field({ value, put, name, inputRef, ...rest }) {
    const given = rest.type === "number" && !Number.isFinite(Number(value)) ? "" : value ?? ""; // an address can hold anything
    const [text, setText] = useState(given);
    const timer = useRef();
    useEffect(() => setText(given), [given]);
    const change = (event) => {
      const wanted = event.target.value;
      setText(wanted);
      clearTimeout(timer.current);
      timer.current = setTimeout(() => put({ [name]: wanted }), 200);
    };
    return html`<input ...${rest} name=${name} ref=${inputRef} value=${text} onInput=${change} />`;
  }

  function Bounds({ query, put }) {
    const active = bounds(query).length;
    return html`<details class="samples-bounds" open=${active > 0}>
      <summary>${active ? t("samples.boundsActive", active) : t("samples.bounds")}</summary>
      <div class="samples-bounds-grid">${QUANTITIES.map((name) => html`<span key=${name} class="samples-bound">
        <${Hint} text=${explain(name)}>${label(name)}<//>
        ${["min", "max"].map((end) => html`<${Field} key=${end} type="number" step="any" name=${`${name}.${end}`}
          value=${query[`${name}.${end}`]} put=${put}
          placeholder=${t(`samples.${end}`)} aria-label=${t(`samples.${end}Of`, label(name))} />`)}</span>`)}</div>
    </details>`;
  }

  function Filters({ samples, query, put, shown, box }) {
    const stops = useMemo(() => [...new Set(samples.columns.stop_reason)].sort(), [samples]);
    const active = FILTERS.some((name) => query[name]);
    const clear = () => put(Object.fromEntries(FILTERS.map((name) => [name, null])));
    return html`<div class="samples-filters">
      <${Field} type="search" name="text" value=${query.text} put=${put} inputRef=${box}
        placeholder=${t("samples.text")} aria-label=${t("samples.text")}
        data-tip=${t("samples.textHint", CHARACTERS.prompt, CHARACTERS.response)} />
      <select aria-label=${t("samples.stop")} value=${query.stop ?? ""} onChange=${(event) => put({ stop: event.target.value })}>
        <option value="">${t("samples.anyStop")}</option>${stops.map((stop) => html`<option key=${stop} value=${stop}>${stop}</option>`)}
      </select>
      <label>${t("samples.group")} <${Field} type="number" min="0" name="group" value=${query.group} put=${put} /></label>
      <${Bounds} query=${query} put=${put} />
      ${active && html`<button type="button" onClick=${clear}>${t("samples.reset")}</button>`}
      <span class="samples-count" role="status">
        ${shown === samples.rows ? t("samples.all", format(shown)) : t("samples.count", format(shown), format(samples.rows))}</span>
    </div>`;
  }

  // ------------------------------------------------------------------ table
  function Head({ query, put, columns }) {
    const by = order(query.sort);
    return html`<tr>${columns.map((name) => {
      const down = by?.key === name ? by.down : null;
      const next = down === null ? (TEXTS.has(name) || name === "row" ? name : `-${name}`) : down ? name : `-${name}`;
      return html`<th key=${name} scope="col" class=${`samples-${name} ${TEXTS.has(name) ? "" : "number"}`}
        aria-sort=${down === null ? "none" : down ? "descending" : "ascending"}>
        <button type="button" onClick=${() => put({ sort: next })} data-tip=${[name === "row" ? t("samples.rowHint") : explain(name),
          t("samples.sortHint")].filter(Boolean).join("\n")}>
          ${label(name)}<span aria-hidden="true">${down === null ? "" : down ? " ▼" : " ▲"}</span></button></th>`;
    })}</tr>`;
  }

  function Row({ samples, row, columns, limits, selected, onOpen, place, href }) {
    const cell = (name) => {
      const value = samples.columns[name]?.[row];
      if (name === "row") return html`<a href=${href} aria-label=${t("samples.open", value)} onClick=${(event) => event.stopPropagation()}>
        ${value}</a>`;
      if (TEXTS.has(name)) return html`<${Visible} text=${value} />`;
      return PAINT[name] ? html`<span class="samples-figure" style=${PAINT[name](value, limits[name])}>${short(value)}</span>` : short(value);
    };
    return html`<tr class=${selected ? "samples-selected" : ""} aria-rowindex=${place + 2} aria-selected=${selected ? "true" : undefined}
      onClick=${onOpen}>
      ${columns.map((name) => html`<td key=${name} class=${`samples-${name} ${TEXTS.has(name) ? "" : "number"}`}>${cell(name)}</td>`)}</tr>`;
  }

  /** The first and last row to draw of `count`, for what the box shows. */
  function useWindow(box, count) {
    const [view, setView] = useState({ top: 0, height: 600 });
    useLayoutEffect(() => {
      const node = box.current;
      let frame = 0;
      const look = () => { frame = 0; setView({ top: node.scrollTop, height: node.clientHeight }); };
      const later = () => { frame ||= requestAnimationFrame(look); };
      node.addEventListener("scroll", later, { passive: true });
      const watcher = new ResizeObserver(later);
      watcher.observe(node);
      look();
      return () => { node.removeEventListener("scroll", later); watcher.disconnect(); cancelAnimationFrame(frame); };
    }, []);
    const first = Math.max(0, Math.min(Math.floor(view.top / HEIGHT) - SPARE, count - 1));
    return [first, Math.min(count, Math.ceil((view.top + view.height) / HEIGHT) + SPARE)];
  }

  function Table({ samples, rows, query, put, hrefOf }) {
    const box = useRef();
    const [first, last] = useWindow(box, rows.length);
    const columns = COLUMNS.filter((name) => samples.columns[name]);
    const limits = useMemo(() => Object.fromEntries(Object.keys(PAINT).map((name) => [name, largest(samples.columns[name] ?? [])])), [samples]);
    const selected = query.at === undefined ? null : Number(query.at);
    const place = rows.indexOf(selected);
    useEffect(() => {
      const node = box.current;
      if (place < 0) return;
      const head = node.querySelector("thead").offsetHeight;
      const top = place * HEIGHT;
      if (top < node.scrollTop) node.scrollTop = top;
      else if (top + HEIGHT + head > node.scrollTop + node.clientHeight) node.scrollTop = top + HEIGHT + head - node.clientHeight;
    }, [place]);
    const select = (to) => (rows.length ? put({ at: rows[Math.max(0, Math.min(rows.length - 1, to))] }) : false);
    // A key may come before the page has followed the one before: the address is ahead of it.
    const now = () => rows.indexOf(Number(parseRoute(location.hash).query.at ?? NaN));
    useKeys({
      j: () => select(now() + 1), k: () => select(now() - 1),
      Enter: (event) => (place < 0 || event.target.closest("a, button, summary") ? false : go(hrefOf(selected))),
    });
    const spacer = (height) => html`<tr class="samples-spacer" aria-hidden="true"><td style=${{ height: `${height}px` }}></td></tr>`;
    return html`<div class="samples-scroll" ref=${box} tabindex="0"><table class="samples-table" aria-rowcount=${rows.length + 1}>
      <thead><${Head} query=${query} put=${put} columns=${columns} /></thead>
      <tbody>${first > 0 && spacer(first * HEIGHT)}
        ${rows.slice(first, last).map((row, i) => html`<${Row} key=${row} samples=${samples} row=${row} columns=${columns} limits=${limits}
          selected=${row === selected} place=${first + i} href=${hrefOf(row)} onOpen=${() => go(hrefOf(row))} />`)}
        ${last < rows.length && spacer((rows.length - last) * HEIGHT)}</tbody>
    </table></div>${rows.length === 0 && html`<${Empty}>${t("samples.none")}<//>`}`;
  }

  function Listing({ runId, step, samples, query, put }) {
    const { view, at, ...filters } = query;
    const key = JSON.stringify(filters);
    const rows = useMemo(() => Pellucid.selection(samples, filters), [samples, key]);
    const box = useRef();
    useKeys({ "/": () => { box.current.focus(); box.current.select(); } });
    const hrefOf = (row) => link({ run: runId, step, page: "token", sample: row });
    return html`<${Panel} name="samples-panel">
      <${Filters} samples=${samples} query=${query} put=${put} shown=${rows.length} box=${box} />
      <${Table} key=${key} samples=${samples} rows=${rows} query=${query} put=${put} hrefOf=${hrefOf} />
      <p class="muted samples-keys">${t("samples.keys")}</p>
    <//>`;
  }

  // ------------------------------------------------------------------ page
  Pellucid.pages.samples = ({ runId, step, state, route }) => {
    const { query } = route;
    const base = `run/${runId}/step/${step}`;
    const { data: samples, error } = usePayload(`${base}/samples.json`, state.revision);
    const { data: about } = usePayload(`${base}/step.json`, state.revision);
    const latest = useRef(query);
    latest.current = query;
    // A field writes a moment later: onto the query as it is then, and not as it was when the key was pressed.
    const put = (changes) => go(link({ run: runId, step, page: "samples", query: { ...latest.current, ...changes } }), { replace: true });
    const view = ["groups", "prompt"].includes(query.view) ? query.view : "table";
    const total = about?.manifest?.samples;
    const props = { runId, step, state, samples, query, put };
    const choice = html`<${Choice} label=${t("samples.view")} value=${view} onChange=${(v) => put({ view: v === "table" ? null : v })}
      options=${[["table", t("samples.table")], ["groups", t("samples.groups")], ["prompt", t("samples.prompt")]]} />`;
    return html`<div class="samples">
      <div class="samples-bar"><h2>${t("samples.title", step)}</h2>${choice}
        ${samples && total > samples.rows && html`<span class="muted">${t("samples.recorded", format(samples.rows), format(total))}</span>`}</div>
      ${error && html`<${Failure} error=${error} />`}
      ${view === "prompt" ? html`<${Pellucid.PromptOverSteps} ...${props} />`
        : !samples ? !error && html`<${Loading} />`
        : samples.rows === 0 ? html`<${Empty}>${t("samples.empty")}<//>`
        : view === "groups" ? html`<${Pellucid.Groups} ...${props} />` : html`<${Listing} ...${props} />`}
    </div>`;
  };
})();
