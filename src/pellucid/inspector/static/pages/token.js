/* The token page: a sample's tokens, and beside them the story of the selected one. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useMemo, useRef, usePayload, useKeys, format, link, go, memory, Panel, Failure, Loading, Term } = Pellucid;
  const { available, scaleOf, Legend, Chart, Tokens } = Pellucid.tokenText;

  // ------------------------------------------------------------------ what is fetched, and what follows from it
  /** {record, error} of a row of samples.json: what Pellucid.sampleAt gives. */
  function useRecord(run, step, row) {
    const key = `${run} ${step} ${row}`;
    const [state, setState] = useState({ key: null });
    useEffect(() => {
      let wanted = true;
      Pellucid.sampleAt(run, step, row).then(
        (record) => wanted && setState({ key, record }),
        (error) => wanted && setState({ key, error }),
      );
      return () => { wanted = false; };
    }, [key]);
    return state.key === key ? state : {};
  }

  /** {told, wrong, error}: the sample worked out, and its contradictions. */
  function useArithmetic(record, manifest, check, samples, groupSize) {
    return useMemo(() => {
      if (!record || !manifest) return { told: null, wrong: [] };
      try {
        const told = Pellucid.arithmetic.read(record, Pellucid.arithmetic.stepOf(manifest, check, samples, groupSize));
        return { told, wrong: Pellucid.arithmetic.contradictions(told) };
      } catch (error) { // a damaged record: the tokens can still be read
        console.error(error);
        return { told: null, wrong: [], error: t("token.broken", error.message) };
      }
    }, [record, manifest, check, samples, groupSize]);
  }

  const PAUSE = 150; // ms between changes of the address: browsers refuse more than about 20 a second
  /** [token, select]: the page follows at once, the address a moment later, without a new entry in the history. */
  function useSelected(place, wanted, initial) {
    const where = `${place.run} ${place.step} ${place.sample}`;
    const [chosen, setChosen] = useState({ where, token: wanted });
    const waiting = useRef(null), last = useRef(0), latest = useRef(wanted);
    useEffect(() => () => { clearTimeout(waiting.current); waiting.current = null; }, [where]);
    useEffect(() => {
      if (waiting.current === null) setChosen({ where, token: wanted });
    }, [where, wanted]);
    const select = (token) => {
      setChosen({ where, token });
      latest.current = token;
      if (waiting.current !== null) return;
      const write = () => {
        waiting.current = null;
        last.current = performance.now();
        go(link({ ...place, token: latest.current }), { replace: true });
      };
      waiting.current = setTimeout(write, Math.max(0, PAUSE - (performance.now() - last.current)));
    };
    return [(chosen.where === where ? chosen.token : wanted) ?? initial, select];
  }

  // ------------------------------------------------------------------ the sample
  const FACTS = ["scores", "length", "kl_sequence", "reward_sum", "entropy_mean", "clipped_share", "minibatch", "policy_version"];
  const MOST_SIBLINGS = 24;

  function Siblings({ columns, place, group }) {
    const rows = columns.row.map((_, i) => i).filter((i) => columns.group_ids[i] === group);
    if (rows.length < 2) return null;
    return html`<nav class="token-siblings" aria-label=${t("token.group")}><span class="hint" tabindex="0" data-tip=${t("token.groupHint")}>${t("token.group")}</span>
      ${rows.slice(0, MOST_SIBLINGS).map((i) => html`<a key=${i} class="button" href=${link({ ...place, sample: i })} aria-current=${i === place.sample ? "page" : undefined}
        aria-label=${t("token.sibling", i, format(columns.scores[i]))}><span class="muted">${i}</span> ${format(columns.scores[i])}</a>`)}
      ${rows.length > MOST_SIBLINGS && html`<span class="muted">${t("token.more", rows.length - MOST_SIBLINGS)}</span>`}</nav>`;
  }

  function Head({ sample, columns, rows, place }) {
    const neighbour = (row, sign, name) => (row >= 0 && row < rows
      ? html`<a class="button" href=${link({ ...place, sample: row })} aria-label=${t(name)} title=${t(name)}>${sign}</a>`
      : html`<span class="button token-off" aria-hidden="true">${sign}</span>`);
    return html`<header class="panel token-head">
      <div class="token-title">${neighbour(place.sample - 1, "◀", "token.previous")}${neighbour(place.sample + 1, "▶", "token.next")}
        <h1>${t("token.title", place.step, place.sample)}</h1>
        <a href=${link({ ...place, page: "samples", sample: null })}>${t("token.list")}</a></div>
      <dl class="token-facts">${FACTS.filter((name) => sample[name] !== undefined && sample[name] !== null).map((name) => html`<div key=${name}>
        <dt><${Term} name=${name}>${t(`token.fact.${name}`)}<//></dt><dd>${format(sample[name])}</dd></div>`)}
        <div><dt><${Term} name="stop_reason">${t("token.fact.stop_reason")}<//></dt><dd>${sample.stop_reason}</dd></div></dl>
      ${columns && html`<${Siblings} columns=${columns} place=${place} group=${sample.group_ids} />`}
    </header>`;
  }

  const MOST_LISTED = 50;
  function Contradictions({ wrong, onSelect, place }) {
    if (!wrong.length) return null;
    const jump = ({ token, line }, key) => html`<a href=${link({ ...place, token })} onClick=${(event) => { event.preventDefault(); onSelect(token); }}>${t(key, token, t(`token.line.${line}`))}</a>`;
    return html`<div class="banner token-banner" role="alert">
      <strong>✗ ${wrong.length === 1 ? t("token.wrong1") : t("token.wrong", format(wrong.length))}</strong> ${jump(wrong[0], "token.wrongFirst")}
      ${wrong.length > 1 && html`<details><summary>${t("token.wrongAll")}</summary><ul>
        ${wrong.slice(0, MOST_LISTED).map((one) => html`<li key=${`${one.token} ${one.line}`}>${jump(one, "token.wrongAt")}</li>`)}
        ${wrong.length > MOST_LISTED && html`<li class="muted">${t("token.wrongMore", format(wrong.length - MOST_LISTED))}</li>`}</ul></details>`}
    </div>`;
  }

  // ------------------------------------------------------------------ the page
  /** Keys of the page: tokens one by one, and the ends of the actions. */
  function useTokenKeys(record, selected, select) {
    const length = record?.arrays.input_ids.length ?? 0, actions = record?.arrays.action_mask;
    const current = useRef(selected); // a key may come before the page has followed the one before
    current.current = selected;
    const to = (at) => {
      if (!(at >= 0 && at < length)) return false;
      current.current = at;
      return select(at);
    };
    useKeys({
      ArrowLeft: () => to(current.current - 1), ArrowRight: () => to(current.current + 1),
      Home: () => to(actions?.indexOf(1) ?? -1), End: () => to(actions?.lastIndexOf(1) ?? -1),
    });
  }

  function useQuantity(arrays, query) {
    const [chosen, setChosen] = useState(null);
    const names = arrays ? available(arrays) : [];
    const wanted = [chosen, query.by, memory.read("token.by"), "push"].find((name) => names.includes(name)) ?? names[0];
    return [names, wanted, (name) => { setChosen(name); memory.write("token.by", name); }];
  }

  function Sample({ place, record, manifest, samples, arithmetic, selected, select, query, linked }) {
    const { told, wrong, error } = arithmetic, { arrays } = record;
    const [names, by, setBy] = useQuantity(arrays, query);
    const dark = Pellucid.isDark(), language = Pellucid.language;
    const scale = useMemo(() => {
      const actions = [];
      arrays.action_mask.forEach((isAction, at) => { if (isAction) actions.push(at); });
      return scaleOf(arrays, actions, by);
    }, [record, by, dark, language]);
    const wrongTokens = useMemo(() => new Set(wrong.map(({ token }) => token)), [wrong]);
    const shared = { scale, name: by, selected, onSelect: select };
    const chooser = html`<label>${t("token.colour")} <select value=${by} onChange=${(event) => setBy(event.target.value)}>
      ${names.map((name) => html`<option key=${name} value=${name}>${t(`token.by.${name}`)}</option>`)}</select></label>`;
    return html`<${Head} sample=${record.sample} columns=${samples?.columns} rows=${samples?.rows ?? 0} place=${place} />
      ${error && html`<${Failure} error=${error} />`}
      <${Contradictions} wrong=${wrong} onSelect=${select} place=${place} />
      <div class="token-columns">
        <${Panel} name="token-panel" title=${t("token.text")} actions=${chooser}>
          <${Legend} scale=${scale} />
          <${Chart} arrays=${arrays} ...${shared} />
          <p class="muted token-keys">${t("token.keys")}</p>
          <${Tokens} key=${place.sample} record=${record} wrong=${wrongTokens} place=${place} linked=${linked} ...${shared} />
        <//>
        <${Pellucid.Story} record=${record} told=${told} at=${selected} manifest=${manifest} />
      </div>`;
  }

  Pellucid.pages.token = function TokenPage({ runId, step, sample, token, route, state }) {
    const place = { run: runId, step, page: "token", sample };
    const base = `run/${runId}/step/${step}`;
    const { record, error } = useRecord(runId, step, sample);
    const manifest = usePayload(`${base}/step.json`, state?.revision);
    // The text comes first; the whole step, which the arithmetic compares with, is asked for when it is there.
    const samples = usePayload(record && `${base}/samples.json`), check = usePayload(record && `${base}/check.json`);
    const config = usePayload(`run/${runId}/config.json`, state?.revision);
    const groupSize = config.data?.config?.rollout?.samples_per_prompt ?? null;
    const arithmetic = useArithmetic(record, manifest.data?.manifest, check.data, samples.data, groupSize);
    const [chosen, select] = useSelected(place, token, Math.max(record?.arrays.action_mask.indexOf(1) ?? 0, 0));
    const selected = record ? Math.min(chosen, record.arrays.input_ids.length - 1) : chosen;
    useTokenKeys(record, selected, select);
    if (error) return html`<${Failure} error=${error} />`;
    if (!record) return html`<${Loading} />`;
    return html`${manifest.error && html`<${Failure} error=${manifest.error} />`}
      ${manifest.data && !manifest.data.manifest && html`<${Failure} error=${t("token.noManifest")} />`}
      <${Sample} place=${place} record=${record} manifest=${manifest.data?.manifest} samples=${samples.data} arithmetic=${arithmetic}
        selected=${selected} select=${select} query=${route.query} linked=${token !== null} />`;
  };
})();
