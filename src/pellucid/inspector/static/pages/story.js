/* The story of one token: the verdict in words, its numbers, the alternatives, and the arithmetic line by line. */
(() => {
  "use strict";
  const { html, t, format, Visible, Term } = Pellucid;
  const PARTS = ["reward", "advantage", "policy", "critic"];
  // The recorded quantity that a line makes, for its explanation.
  const TERMS = {
    kl: "kl", reward: "rewards", next_value: "old_values", return: "returns", mean: "whitening", variance: "whitening", advantage: "advantages",
    reward_sum: "reward_sum", log_ratio: "log_ratio", ratio: "ratio", clipped: "clipped", denominator: "actor_denominator", gradient: "logprob_grads",
    value_clipped: "value_clipped", critic_denominator: "critic_denominator", value_gradient: "value_grads",
  };

  // ------------------------------------------------------------------ a token as text
  const MOST_BYTES = 16;
  /** The bytes of a token that are no text by themselves, as ⟨E2 82⟩. */
  function bytesText(hex) {
    const pairs = hex.toUpperCase().match(/../g) ?? [];
    return `⟨${pairs.slice(0, MOST_BYTES).join(" ")}${pairs.length > MOST_BYTES ? ` … ${pairs.length}` : ""}⟩`;
  }
  /** What a token stands for, everything visible: a special token in a frame, bytes that are no text in brackets. */
  function Piece({ piece, limit = 80, multiline = false }) {
    if (!piece) return html`<span class="unseen">⟨?⟩</span>`;
    const text = piece.bytes !== undefined ? html`<span class="unseen">${bytesText(piece.bytes)}</span>`
      : piece.text === "" ? html`<span class="unseen">⟨⟩</span>` : html`<${Visible} text=${piece.text} limit=${limit} multiline=${multiline && !piece.special} />`;
    return piece.special ? html`<span class="token-special">${text}</span>` : text;
  }
  function pieceNote(piece) {
    if (!piece) return t("token.piece.unknown");
    if (piece.special) return t("token.piece.special");
    if (piece.bytes !== undefined) return t("token.piece.bytes", piece.bytes.length > 2 * MOST_BYTES ? "…" : piece.bytes.toUpperCase().match(/../g)?.join(" ") ?? "");
    return piece.text === "" ? t("token.piece.empty") : null;
  }

  // ------------------------------------------------------------------ the verdict
  const SIGNS = { up: "▲", down: "▼", none: "■" };
  const filled = ({ key, values = [] }) => t(key, ...values.map((v) => (typeof v === "number" || v === undefined ? format(v) : v)));

  function Verdict({ told, at }) {
    const { push, parts } = Pellucid.arithmetic.verdict(told, at);
    return html`<div class=${`token-verdict is-${push}`} role="status">
      <span class="token-sign" aria-hidden="true">${SIGNS[push]}</span>
      <div>${parts.map((part, i) => html`<p key=${part.key} class=${i ? "" : "token-verdict-head"}>${filled(part)}</p>`)}</div>
    </div>`;
  }

  // ------------------------------------------------------------------ its numbers, by who computed them
  function Passes({ arrays, at, manifest }) {
    const passes = [["sampler", "rollout_logprobs"], ["before", "old_logprobs"], ["reference", "ref_logprobs"], ["last", "logprobs"]].filter(([, name]) => arrays[name]);
    const version = (name) => manifest?.tensors?.find((tensor) => tensor.name === name)?.weight_version;
    const value = (name) => arrays[name]?.[at];
    const rows = [
      ["logprob", passes.map(([, name]) => value(name))],
      ["probability", passes.map(([, name]) => Math.exp(value(name)))],
      ["reference", passes.map(([, name]) => (name === "ref_logprobs" || !arrays.ref_logprobs ? null : value(name) - value("ref_logprobs")))],
      arrays.entropy && ["entropy", passes.map(([pass]) => (pass === "before" ? value("entropy") : null))],
      arrays.old_values && ["value", passes.map(([pass]) => (pass === "before" ? value("old_values") : pass === "last" ? value("values") : null))],
    ].filter(Boolean);
    return html`<div class="scroll-x"><table class="token-passes">
      <thead><tr><td></td>${passes.map(([pass, name]) => html`<th key=${pass} scope="col" class="number"><${Term} name=${name}>${t(`token.pass.${pass}`)}<//>
        ${version(name) !== undefined && html`<span class="token-version">${t("token.version", format(version(name)))}</span>`}</th>`)}</tr></thead>
      <tbody>${rows.map(([row, cells]) => html`<tr key=${row}><th scope="row">${t(`token.row.${row}`)}</th>
        ${cells.map((cell, i) => html`<td key=${i} class="number">${cell === null ? "" : format(cell)}</td>`)}</tr>`)}</tbody>
    </table></div>`;
  }

  // ------------------------------------------------------------------ the alternatives
  function Alternatives({ arrays, widths, pieces, at }) {
    const width = widths.top_ids;
    const ids = Array.from(arrays.top_ids.slice(at * width, (at + 1) * width));
    const shares = Array.from(arrays.top_logprobs.slice(at * width, (at + 1) * width), Math.exp);
    const own = arrays.input_ids[at], rows = ids.map((id, i) => ({ id, share: shares[i] }));
    if (!ids.includes(own)) rows.push({ id: own, share: Math.exp(arrays.old_logprobs[at]) });
    const rest = 1 - rows.reduce((sum, { share }) => sum + share, 0);
    if (rest > 5e-4) rows.push({ id: null, share: rest });
    return html`<table class="token-alternatives"><tbody>${rows.map(({ id, share }) => html`<tr key=${id} class=${id === own ? "is-own" : ""}>
      <th scope="row">${id === null ? html`<span class="muted">${t("token.rest")}</span>` : html`<${Piece} piece=${pieces[id]} limit=${40} />`}
        ${id === own && html`<span class="token-chosen">${t("token.chosen")}</span>`}</th>
      <td class="token-share"><span style=${{ width: `${100 * Math.min(share, 1)}%` }}></span></td>
      <td class="number">${format(100 * share)} %</td>
    </tr>`)}</tbody></table>`;
  }

  // ------------------------------------------------------------------ the arithmetic
  const shown = (value) => (typeof value === "boolean" ? t(value ? "token.yes" : "token.no") : Pellucid.numbers.figure(value));
  /** In a contradiction every digit counts. */
  const inFull = (value) => (typeof value === "boolean" ? shown(value) : String(Number(value.toPrecision(9))).replace(/-/g, "−"));

  function Recorded({ recorded, agrees, result }) {
    if (agrees === true) return html`<span class="token-right">${t("token.right", shown(recorded))}</span>`;
    if (agrees === false) return html`<strong class="token-contradiction">${t("token.contradiction", inFull(recorded))}</strong>`;
    if (recorded !== undefined && result === null) return html`<span class="muted">${t("token.recordedOnly", shown(recorded))}</span>`;
    return null;
  }
  function Line({ line }) {
    const { id, symbol, numbers, result, agrees, note } = line;
    const value = result === null ? "" : agrees === false ? inFull(result) : shown(result);
    return html`<li class=${`token-line ${agrees === false ? "is-wrong" : ""}`}>
      <div class="token-line-head"><${Term} name=${TERMS[id]}>${t(`token.line.${id}`)}<//> <${Recorded} ...${line} /></div>
      <div class="token-formula"><span class="token-symbol">${symbol}</span>${" "}
        ${numbers && html`<span>= ${numbers} </span>`}${result !== null && !/(^|= )0$/.test(symbol) && html`<span class="token-result">= ${value}</span>`}</div>
      ${note && html`<div class="token-note">${filled(note)}</div>`}
    </li>`;
  }
  function Part({ part, lines }) {
    const wrong = lines.filter(({ agrees }) => agrees === false).length, right = lines.filter(({ agrees }) => agrees === true).length;
    return html`<details class="token-part" open>
      <summary>${t(`token.part.${part}`)} <span class=${wrong ? "token-contradiction" : "token-right"}>${wrong ? t("token.partWrong", wrong) : right ? t("token.partRight", right) : ""}</span></summary>
      <ol>${lines.map((line) => html`<${Line} key=${line.id} line=${line} />`)}</ol>
    </details>`;
  }
  function Arithmetic({ told, at }) {
    const lines = Pellucid.arithmetic.lines(told, at);
    return PARTS.map((part) => [part, lines.filter((line) => line.part === part)]).filter(([, found]) => found.length)
      .map(([part, found]) => html`<${Part} key=${part} part=${part} lines=${found} />`);
  }

  // ------------------------------------------------------------------ the whole
  /** record: of Pellucid.sampleAt; told: of arithmetic.read, or null; at: the token. */
  function Story({ record, told, at, manifest }) {
    const { arrays, pieces, widths } = record;
    const id = arrays.input_ids[at], piece = pieces[id], isAction = Boolean(arrays.action_mask[at]);
    const role = isAction ? "action" : arrays.response_mask[at] ? "notAction" : "ofPrompt";
    const facts = [t("token.at", format(at + 1), format(arrays.input_ids.length)), t("token.id", String(id)), t(`token.${role}`), pieceNote(piece)].filter(Boolean);
    return html`<section class="panel token-story" aria-label=${t("token.story", at)}>
      <header class="token-story-head"><h2>${t("token.story", at)}</h2><span class="token-piece"><${Piece} piece=${piece} /></span><span class="muted">${facts.join(" · ")}</span></header>
      ${told && html`<${Verdict} told=${told} at=${at} />`}
      ${isAction && html`<h3>${t("token.numbers")}</h3><${Passes} arrays=${arrays} at=${at} manifest=${manifest} />`}
      ${isAction && arrays.top_ids && arrays.top_logprobs && html`<h3>${t("token.alternatives")}</h3><${Alternatives} arrays=${arrays} widths=${widths} pieces=${pieces} at=${at} />`}
      ${told && html`<${Arithmetic} told=${told} at=${at} />`}
      <details class="token-about"><summary>${t("token.about")}</summary>
        <p>${t("token.aboutText")} ${told?.algorithm.ptx_coef > 0 && t("token.aboutPtx")}</p><p>${t("token.aboutSlack")}</p></details>
    </section>`;
  }

  Object.assign(Pellucid, { Story, Piece });
})();
