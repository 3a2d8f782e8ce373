/* The help: keys, and the quantities of the record with their formulas. */
(() => {
  "use strict";
  const { html, t, useState, Dialog, glossary, chapterOf, roadMap } = Pellucid;
  const KEYS = [
    [["[", "]"], "key.steps"], [["{", "}"], "key.ends"], [["1", "2", "3", "4"], "key.tabs"], [["j", "k"], "key.samples"], [["Enter"], "key.open"],
    [["←", "→"], "key.tokens"], [["/"], "key.filter"], [["?"], "key.help"], [["Esc"], "key.escape"],
  ];

  const Link = ({ to, children }) => html`<a href=${to} target="_blank" rel="noopener">${children}</a>`;

  /** Where the road explains a quantity. */
  function Chapter({ name }) {
    const [number, to] = chapterOf(name) ?? [];
    return to ? html` <${Link} to=${to}>${t("shell.chapter", number)}<//>` : null;
  }

  function Terms() {
    const [wanted, setWanted] = useState("");
    const matches = ([name, { text }]) => `${name} ${text}`.toLowerCase().includes(wanted.toLowerCase());
    const row = ([name, { text, formula, unit }]) => html`<div key=${name}>
      <dt>${name}</dt>
      <dd>${text}${formula && html` <code>${formula}</code>`}${unit && html` <span class="muted">(${unit})</span>`}<${Chapter} name=${name} /></dd>
    </div>`;
    return html`<div>
      <input type="search" value=${wanted} placeholder=${t("shell.termFilter")} aria-label=${t("shell.termFilter")}
        onInput=${(event) => setWanted(event.target.value)} />
      <dl class="glossary">${Object.entries(glossary).filter(matches).map(row)}</dl>
    </div>`;
  }

  Pellucid.Help = ({ onClose }) => html`<${Dialog} title=${t("shell.help")} onClose=${onClose}>
    <h3>${t("shell.keys")}</h3>
    <table class="keys"><tbody>
      ${KEYS.map(([keys, text]) => html`<tr key=${text}><td>${keys.map((key) => html`<kbd>${key}</kbd> `)}</td><td>${t(text)}</td></tr>`)}
    </tbody></table>
    <h3>${t("shell.terms")}</h3>
    <p><${Link} to=${roadMap()}>${t("shell.road")}<//></p>
    <${Terms} />
  <//>`;
})();
