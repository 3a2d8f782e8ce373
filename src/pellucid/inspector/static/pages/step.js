/* One iteration: its data flow, its timeline, every tensor, the weights and the metrics. */
(() => {
  "use strict";
  const { html, t, useState, useMemo, format, bytes, Panel, Failure, Empty, Loading } = Pellucid;
  const GROUPS = ["score", "kl", "policy", "rollout", "advantages", "groups", "critic", "actor", "time"];
  const NUMBERS = ["order", "weight_version", "bytes", "mean", "std", "min", "max"];
  const COLUMNS = ["order", "name", "producer", "phase", "weight_version", "shape", "dtype", "bytes", "mean", "std", "min", "max", "hash"];
  const label = (column) => t(`step.field.${column === "weight_version" ? "version" : column}`);

  // ------------------------------------------------------------------ tensors
  const compare = (column) => (a, b) => {
    const value = (tensor) => (column === "shape" ? (tensor.shape ?? []).reduce((size, n) => size * n, 1) : tensor[column] ?? null);
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;
    return (typeof x === "number" ? x - y : String(x).localeCompare(String(y))) || a.order - b.order;
  };
  /** Sorted by a column; what has no value there comes last in both directions. */
  function sorted(tensors, { column, down }) {
    const rows = [...tensors].sort(compare(column));
    if (!down) return rows;
    const has = (tensor) => tensor[column] !== null && tensor[column] !== undefined;
    return [...rows.filter(has).reverse(), ...rows.filter((tensor) => !has(tensor))];
  }
  function cell(tensor, column) {
    const value = tensor[column];
    if (column === "name") return html`<th scope="row" key="name"><${Pellucid.Term} name=${value}><code>${value}</code><//></th>`;
    if (column === "hash") return html`<td key="hash"><code title=${value ?? ""}>${value ? value.slice(0, 8) : "–"}</code></td>`;
    if (column === "shape") return html`<td key="shape">${value ? value.join(" × ") : "–"}</td>`;
    if (column === "bytes") return html`<td key="bytes" class="number" title=${format(value)}>${bytes(value)}</td>`;
    return html`<td key=${column} class=${NUMBERS.includes(column) ? "number" : ""}>${format(value)}</td>`;
  }
  function Tensors({ index, step }) {
    const [order, setOrder] = useState({ column: "order", down: false });
    const tensors = Object.values(index.tensors);
    if (!tensors.length) return html`<${Empty}>${t("step.tensors.none")}<//>`;
    const choose = (column) => setOrder((old) => ({ column, down: old.column === column && !old.down }));
    const head = (column) => {
      const is = order.column === column;
      return html`<th scope="col" key=${column} class=${NUMBERS.includes(column) ? "number" : ""} aria-sort=${is ? (order.down ? "descending" : "ascending") : "none"}>
        <button type="button" class="step-sort" title=${t("step.sortBy", label(column))} onClick=${() => choose(column)}>${label(column)}<span aria-hidden="true">${is ? (order.down ? " ▾" : " ▴") : ""}</span></button></th>`;
    };
    return html`<div class="scroll-x" tabindex="0" role="region" aria-label=${t("step.tensors.caption", step)}>
      <table class="step-table"><caption class="visually-hidden">${t("step.tensors.caption", step)}</caption>
        <thead><tr>${COLUMNS.map(head)}</tr></thead>
        <tbody>${sorted(tensors, order).map((tensor) => html`<tr key=${tensor.name}>${COLUMNS.map((column) => cell(tensor, column))}</tr>`)}</tbody>
      </table></div>`;
  }

  // ------------------------------------------------------------------ weights, metrics
  function Weights({ weights }) {
    if (!weights.length) return html`<${Empty}>${t("step.weights.none")}<//>`;
    const row = (w) => html`<tr key=${w.role}><th scope="row">${w.role}</th><td class="number">${format(w.version)}</td><td class="number">${format(w.parameters)}</td>
      <td>${w.precision ?? "–"}</td><td>${w.dtype ?? "–"}</td><td class="number">${bytes(w.bytes)}</td><td><code title=${w.hash ?? ""}>${w.hash ? w.hash.slice(0, 8) : "–"}</code></td></tr>`;
    return html`<div class="scroll-x" tabindex="0" role="region" aria-label=${t("step.weights")}><table class="step-table">
      <thead><tr>${["role", "version", "parameters", "precision", "dtype", "bytes", "hash"].map((f) => html`<th scope="col" key=${f} class=${["version", "parameters", "bytes"].includes(f) ? "number" : ""}>${t(`step.field.${f}`)}</th>`)}</tr></thead>
      <tbody>${weights.map(row)}</tbody></table></div>`;
  }

  function Metrics({ metrics }) {
    const names = Object.keys(metrics).filter((name) => name !== "step");
    if (!names.length) return html`<${Empty}>${t("step.metrics.none")}<//>`;
    const prefix = (name) => name.split("/")[0];
    const prefixes = [...new Set([...GROUPS, ...names.map(prefix)])].filter((group) => names.some((name) => prefix(name) === group));
    const title = (group) => (Pellucid.hasText(`step.metrics.${group}`) ? t(`step.metrics.${group}`) : group);
    const figure = (name) => (prefix(name) === "time" ? Pellucid.seconds(metrics[name]) : format(metrics[name]));
    return html`<div class="step-metrics">${prefixes.map((group) => html`<section key=${group}><h3>${title(group)}</h3>
      <dl>${names.filter((name) => prefix(name) === group).map((name) => html`<div key=${name}>
        <dt><${Pellucid.Term} name=${name}><code>${name}</code><//></dt><dd class="number">${figure(name)}</dd></div>`)}</dl></section>`)}</div>`;
  }

  // ------------------------------------------------------------------ the page
  function summary({ algorithm: a }) {
    const parts = [a.advantage && `advantage ${a.advantage}`, a.policy_loss && `policy_loss ${a.policy_loss}`,
      a.clip_eps_low !== undefined && `clip ${format(1 - a.clip_eps_low)} … ${format(1 + a.clip_eps_high)}`,
      a.kl_coef !== undefined && `kl_coef ${format(a.kl_coef)} (${a.kl_in}${a.kl_in === "loss" ? `, ${a.kl_loss}` : ""})`,
      a.gamma !== undefined && `gamma ${format(a.gamma)}`, a.advantage === "gae" && `gae_lambda ${format(a.gae_lambda)}`,
      a.aggregate && `aggregate ${a.aggregate}`, a.ptx_coef > 0 && `ptx_coef ${format(a.ptx_coef)}`];
    return parts.filter(Boolean);
  }
  /** What the record was made with and on: the last bits of every figure depend on it. */
  function origin({ pellucid, environment: e }) {
    const parts = [pellucid && t("step.made", pellucid), e?.torch && `torch ${e.torch}`, e?.device, e?.cpu, e?.threads && t("step.threads", e.threads)];
    return parts.filter(Boolean).join(" · ");
  }
  const Fault = ({ fault }) => html`<${Failure} error=${typeof fault === "string" ? fault : fault.file ? t("step.fault", fault.file, fault.problem) : fault.problem} />`;

  function StepPage({ runId, step, state, route }) {
    const { data, error } = Pellucid.usePayload(`run/${runId}/step/${step}/step.json`, state?.revision);
    const config = Pellucid.usePayload(`run/${runId}/config.json`, state?.revision).data?.config;
    const index = useMemo(() => data && Pellucid.stepIndex(data.manifest ?? {}, data.spans ?? [], config), [data, config]);
    const head = html`<h1 class="step-title">${t("step.title", step)}</h1>`;
    if (!index) return html`<div class="step">${head}${error ? html`<${Failure} error=${error} />` : html`<${Loading} />`}</div>`;
    const { manifest } = index;
    // The box that is kept open is part of the address, without a new entry in the history.
    const pin = (node) => history.replaceState(history.state, "", Pellucid.link({ run: runId, step, page: "step", query: { ...route?.query, node } }));
    const place = { run: runId, step };
    return html`<div class="step">
      <header class="step-head">${head}
        ${manifest.samples !== undefined && html`<p class="muted">${t("step.size", format(manifest.samples), format(manifest.recorded), format(manifest.num_action_tokens), format(manifest.width))}</p>`}
        ${origin(manifest) && html`<p class="muted">${origin(manifest)}</p>`}
        <ul class="step-chips" aria-label=${t("step.algorithm")}>${summary(index).map((part) => html`<li key=${part}>${part}</li>`)}</ul></header>
      ${error && html`<${Failure} error=${error} />`}
      ${(data.faults ?? []).map((fault, i) => html`<${Fault} key=${i} fault=${fault} />`)}
      ${!data.manifest && html`<p class="muted">${t("step.noManifest")}</p>`}
      <${Panel} title=${t("step.flow")} hint=${t("step.flow.hint")} name="step-flow-panel">
        <${Pellucid.StepFlow} key=${`${runId} ${step}`} index=${index} step=${step} chosen=${route?.query?.node} onPin=${pin}
          detail=${(node, onClose) => html`<${Pellucid.StepDetail} node=${node} index=${index} place=${place} onClose=${onClose} />`} />
      <//>
      <${Panel} title=${t("step.time")} hint=${t("step.time.hint")}><${Pellucid.StepTimeline} index=${index} step=${step} /><//>
      <${Panel} title=${t("step.tensors")} hint=${t("step.tensors.hint")}><${Tensors} index=${index} step=${step} /><//>
      <${Panel} title=${t("step.weights")} hint=${t("step.weights.hint")}><${Weights} weights=${manifest.weights ?? []} /><//>
      <${Panel} title=${t("step.metrics")}><${Metrics} metrics=${index.metrics} /><//>
    </div>`;
  }

  Pellucid.pages.step = StepPage;
})();
