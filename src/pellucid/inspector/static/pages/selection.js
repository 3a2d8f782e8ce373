/* Which samples of a step are shown, and in which order: from samples.json and a route's query. */
(() => {
  "use strict";
  /** Quantities that can be bounded, in the order of the table. */
  const QUANTITIES = ["scores", "length", "kl_sequence", "advantage_mean", "reward_sum", "entropy_mean", "clipped_share", "minibatch"];
  const CHARACTERS = { prompt: 100, response: 200 }; // what samples.json holds of a text

  const figure = (text) => (text === undefined || text === "" || !Number.isFinite(Number(text)) ? null : Number(text));

  /** [[column, low, high]] of the bounds in a query; null where open. */
  function bounds(query) {
    return QUANTITIES.map((name) => [name, figure(query[`${name}.min`]), figure(query[`${name}.max`])]).filter(([, low,
      high]) => low !== null || high !== null);
  }

  /** {key, down} of "scores" or "-scores"; null for the order of the file. */
  function order(sort) {
    if (!sort) return null;
    return { key: sort.replace(/^-/, ""), down: sort.startsWith("-") };
  }

  function tests({ columns }, query) {
    const all = [];
    const text = (query.text || "").toLowerCase();
    if (text) all.push((i) => columns.prompt[i].toLowerCase().includes(text) || columns.response[i].toLowerCase().includes(text));
    if (query.stop) all.push((i) => columns.stop_reason[i] === query.stop);
    const group = figure(query.group);
    if (group !== null) all.push((i) => columns.group_ids[i] === group);
    for (const [name, low, high] of bounds(query)) {
      const values = columns[name] ?? [];
      all.push((i) => Number.isFinite(values[i]) && (low === null || values[i] >= low) && (high === null || values[i] <= high));
    }
    return all;
  }

  /** Indices (places in samples.json) of the samples that pass the filters of `query`, sorted as it says; what is not defined comes last. */
  function selection(samples, query) {
    const all = tests(samples, query);
    const rows = [];
    for (let i = 0; i < samples.rows; i += 1) if (all.every((test) => test(i))) rows.push(i);
    const by = order(query.sort);
    const values = by && samples.columns[by.key];
    if (!values) return rows;
    const missing = (value) => value === null || value === undefined || Number.isNaN(value);
    const sign = by.down ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
      return (x < y ? -sign : x > y ? sign : 0) || a - b;
    });
  }

  Object.assign(Pellucid, { selection, samplesQuery: { QUANTITIES, CHARACTERS, bounds, order } });
})();
