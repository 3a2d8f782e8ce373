/* The configuration of a run as text, and of several runs key by key. */
(() => {
  "use strict";
  const { html, t, useState, useMemo, Visible, Panel, Choice, Empty, visibleText } = Pellucid;

  /** {"section.key": text} of a nested config. */
  function flattened(config, prefix = "") {
    const flat = {};
    for (const [key, value] of Object.entries(config ?? {})) {
      if (value !== null && typeof value === "object" && !Array.isArray(value)) Object.assign(flat, flattened(value, `${prefix}${key}.`));
      else flat[prefix + key] = JSON.stringify(value);
    }
    return flat;
  }

  /** The lines that contain `wanted`, under the headings of their tables. */
  function found(toml, wanted) {
    const needle = wanted.toLowerCase();
    const kept = [];
    let heading = null, whole = false;
    for (const line of toml.split("\n")) {
      if (/^\s*\[/.test(line)) {
        heading = line;
        whole = line.toLowerCase().includes(needle);
        if (whole) { kept.push(line); heading = null; }
      } else if (whole || line.toLowerCase().includes(needle)) {
        if (heading !== null) { kept.push(heading); heading = null; }
        kept.push(line);
      }
    }
    return kept;
  }

  function Text({ toml, wanted }) {
    const lines = useMemo(() => (wanted ? found(toml, wanted) : toml.trimEnd().split("\n")), [toml, wanted]);
    if (!lines.length) return html`<${Empty}>${t("run.noMatch", visibleText(wanted, 60))}<//>`;
    return html`<pre class="run-toml" tabindex="0">${lines.map((line, i) => html`<div key=${i} class=${/^\s*\[/.test(line) ? "run-table" : ""}>
      <${Visible} text=${line} limit=${2000} /></div>`)}</pre>`;
  }

  function Keys({ loaded, wanted, differing }) {
    const flat = useMemo(() => loaded.map(({ config }) => flattened(config?.config)), [loaded]);
    const keys = [...new Set(flat.flatMap(Object.keys))].filter((key) => {
      const values = flat.map((one) => one[key]);
      const matches = !wanted || [key, ...values].some((text) => text?.toLowerCase().includes(wanted.toLowerCase()));
      return matches && (!differing || new Set(values).size > 1);
    });
    if (!keys.length) return html`<${Empty}>${differing && !wanted ? t("run.same") : t("run.noMatch", visibleText(wanted, 60))}<//>`;
    return html`<div class="scroll-x" tabindex="0"><table class="run-keys">
      <thead><tr><th>${t("run.key")}</th>${loaded.map(({ id, name }) => html`<th key=${id}>${visibleText(name, 40)}</th>`)}</tr></thead>
      <tbody>${keys.map((key) => {
        const differs = new Set(flat.map((one) => one[key])).size > 1;
        return html`<tr key=${key} class=${differs ? "run-differs" : ""}><th scope="row"><code><${Visible} text=${key} limit=${100} /></code></th>
          ${flat.map((one, r) => html`<td key=${loaded[r].id}>${one[key] === undefined ? "–" : html`<code>
            <${Visible} text=${one[key]} limit=${200} /></code>`}</td>`)}</tr>`;
      })}</tbody>
    </table></div>`;
  }

  Pellucid.Config = ({ loaded }) => {
    const [wanted, setWanted] = useState("");
    const [side, setSide] = useState(true);
    const [differing, setDiffering] = useState(false);
    const several = loaded.length > 1;
    const toml = loaded[0]?.config?.toml;
    const actions = html`
      ${several && html`<${Choice} label=${t("run.config")} value=${side} onChange=${setSide}
        options=${[[true, t("run.keys")], [false, t("run.text")]]} />`}
      ${several && side && html`<label><input type="checkbox" checked=${differing}
        onChange=${(event) => setDiffering(event.target.checked)} />${t("run.differing")}</label>`}
      <input type="search" value=${wanted} placeholder=${t("run.findKey")} aria-label=${t("run.findKey")}
        onInput=${(event) => setWanted(event.target.value)} />`;
    return html`<${Panel} title=${t("run.config")} actions=${actions} name="run-config">
      ${several && side ? html`<${Keys} loaded=${loaded} wanted=${wanted} differing=${differing} />`
        : toml ? html`<${Text} toml=${toml} wanted=${wanted} />` : html`<${Empty}>${t("run.noConfig")}<//>`}
    <//>`;
  };
})();
