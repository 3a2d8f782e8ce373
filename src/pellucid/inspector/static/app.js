/* The shell around the pages: header, steps, tabs, keys, and which page is in view. */
(() => {
  "use strict";
  const { html, t, useState, useEffect, useRef, useErrorBoundary, source, link, go, parseRoute, useKeys, Failure, Loading, Visible,
    visibleText } = Pellucid;
  const TABS = ["run", "step", "samples", "token"];

  /** Where the reader was, so that tabs lead back there: step, sample, and the samples' filters, of the run in view. */
  const memory = { run: null, step: null, sample: null, query: {} };
  function remember(run, route, step) {
    if (memory.run !== run) Object.assign(memory, { run, step: null, sample: null, query: {} });
    const chosen = route.step ?? (route.query.at && route.page === "run" ? step : memory.step); // else the newest is followed
    if (memory.step !== chosen) memory.sample = null;
    memory.step = chosen;
    if (route.sample !== null) memory.sample = route.sample;
    if (route.page === "samples") memory.query = route.query;
  }

  function useRoute() {
    const [route, setRoute] = useState(() => parseRoute(location.hash));
    useEffect(() => {
      const follow = () => setRoute(parseRoute(location.hash));
      addEventListener("hashchange", follow);
      return () => removeEventListener("hashchange", follow);
    }, []);
    return route;
  }
  function useSettings() {
    const [, setCount] = useState(0);
    useEffect(() => Pellucid.listen(() => setCount((n) => n + 1)), []);
  }

  /** The step in view: the route's, else the one the run page marks or that was open before, else the newest. */
  function currentStep(run, route, steps) {
    if (route.step !== null) return route.step;
    const wanted = route.page === "run" && route.query.at ? Number(route.query.at) : memory.run === run ? memory.step : null;
    return steps.includes(wanted) ? wanted : steps.at(-1) ?? null;
  }

  /** The link that shows `step` on the page in view. */
  function atStep(run, route, step) {
    if (route.page === "run") return link({ run, page: "run", query: { ...route.query, at: step } });
    return link({ run, step, page: route.page, sample: route.sample, query: route.query });
  }
  function tabLink(page, run, step, query) {
    if (page === "run") return link({ run, page, query });
    return link({ run, step, page, sample: page === "token" ? memory.sample ?? 0 : null, query: page === "samples" ? memory.query : null });
  }

  // ------------------------------------------------------------------ header
  function Tabs({ run, step, route, compared }) {
    return html`<nav class="shell-tabs" aria-label=${t("shell.views")}>
      ${TABS.map((page, i) => {
        const off = step === null && page !== "run";
        return html`<a key=${page} href=${off ? undefined : tabLink(page, run, step, page === "run" ? { with: compared } : null)}
          aria-current=${route.page === page ? "page" : undefined} aria-disabled=${off ? "true" : undefined}
          title=${off ? t("shell.noStepsLong") : String(i + 1)}
          >${t(`shell.${page}`)}</a>`;
      })}
    </nav>`;
  }

  function Steps({ run, route, step, steps }) {
    if (!steps.length) return html`<span class="muted" title=${t("shell.noStepsLong")}>${t("shell.noSteps")}</span>`;
    const at = steps.indexOf(step);
    const show = (wanted) => go(atStep(run, route, wanted));
    const nearest = (wanted) => steps.reduce((best, s) => (Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best), steps[0]);
    const button = (sign, name, target) => html`<button type="button" aria-label=${t(name)} title=${t(name)}
      disabled=${target === undefined || target === step}
      onClick=${() => show(target)}>${sign}</button>`;
    return html`<span class="shell-steps" role="group" aria-label=${t("shell.steps")}>
      ${button("|◀", "shell.first", steps[0])}${button("◀", "shell.previous", before(steps, step))}
      <input type="number" aria-label=${t("shell.stepNumber")} min=${steps[0]} max=${steps.at(-1)} value=${step}
        onChange=${(event) => event.target.value && show(nearest(Number(event.target.value)))} />
      <span class="muted">/ ${steps.at(-1)}</span>
      ${button("▶", "shell.next", after(steps, step))}${button("▶|", "shell.last", steps.at(-1))}
      ${steps.length > 2 && html`<input type="range" aria-label=${t("shell.stepSlider")} min="0" max=${steps.length - 1} value=${Math.max(at, 0)}
        aria-valuetext=${step} onChange=${(event) => show(steps[Number(event.target.value)])} />`}
    </span>`;
  }
  const before = (steps, step) => steps.findLast((s) => s < step);
  const after = (steps, step) => steps.find((s) => s > step);

  function Live({ state, live, error }) {
    const at = state ? new Date(state.last_change * 1000).toLocaleString(Pellucid.language === "zh" ? "zh-CN" : "en-GB") : "–";
    const [kind, text, hint] = error?.unreachable ? ["is-gone", "shell.gone", "shell.goneHint"]
      : !state ? ["", null, null]
      : state.finished ? ["", "shell.finished", "shell.finishedHint"]
      : live ? ["is-live", "shell.live", "shell.liveHint"] : ["", "shell.unfinished", "shell.unfinishedHint"];
    const time = at.split(/,? /).at(-1);
    return text && html`<span class=${`shell-live ${kind}`} role="status" title=${t(hint, at)}><span class="dot"></span>${t(text, time)}</span>`;
  }

  function Settings({ onHelp }) {
    return html`<select aria-label=${t("shell.theme")} title=${t("shell.theme")} value=${Pellucid.theme}
      onChange=${(event) => Pellucid.setTheme(event.target.value)}>
        ${["auto", "light", "dark"].map((name) => html`<option key=${name} value=${name}>${t(`shell.${name}`)}</option>`)}
      </select>
      <select aria-label=${t("shell.language")} title=${t("shell.language")} value=${Pellucid.language}
        onChange=${(event) => Pellucid.setLanguage(event.target.value)}>
        ${Object.entries(Pellucid.LANGUAGES).map(([code, name]) => html`<option key=${code} value=${code} lang=${code}>${name}</option>`)}
      </select>
      <button type="button" aria-label=${t("shell.help")} title=${`${t("shell.help")}  ?`} onClick=${onHelp}>?</button>`;
  }

  function RunChoice({ runs, run }) {
    if (runs.length === 1) return html`<span class="shell-run" title=${visibleText(run.path, 200)}>
      <${Visible} text=${run.name} limit=${80} /></span>`;
    return html`<select class="shell-run" aria-label=${t("shell.chooseRun")} value=${run?.id}
      onChange=${(event) => go(link({ run: event.target.value, page: "run" }))}>
      ${runs.map(({ id, name, path }) => html`<option key=${id} value=${id} title=${visibleText(path, 200)}>${visibleText(name, 80)}</option>`)}
    </select>`;
  }

  function Faults({ faults }) {
    if (!faults?.length) return null;
    return html`<details class="banner" open=${faults.length <= 3}>
      <summary>⚠ ${faults.length === 1 ? t("shell.faults1") : t("shell.faults", faults.length)}</summary>
      <ul>${faults.map(({ file, problem }) => html`<li key=${file + problem}>
        <code><${Visible} text=${file} limit=${200} /></code>: <${Visible} text=${problem} limit=${400} /></li>`)}</ul>
    </details>`;
  }

  // ------------------------------------------------------------------ page
  function Page({ props, page }) {
    const [error, reset] = useErrorBoundary();
    const where = JSON.stringify(props.route);
    const failedAt = useRef(null);
    if (error && failedAt.current === null) { failedAt.current = where; console.error(error); }
    useEffect(() => {
      if (error && failedAt.current !== where) { failedAt.current = null; reset(); }
    }, [where, error]);
    if (error) return html`<${Failure} error=${t("shell.pageFailed", error.message)} />`;
    const Component = Pellucid.pages[page];
    if (!Component) return html`<${Failure} error=${t("shell.noPage")} />`;
    if (page !== "run" && props.step === null) return html`<p class="empty muted">${t("shell.noStepsLong")}</p>`;
    return html`<${Component} ...${props} />`;
  }

  /** j and k on a token page: the neighbour in the order and under the filters that the samples page had. */
  async function nextSample(run, step, sample, by) {
    const samples = await source.get(`run/${run}/step/${step}/samples.json`);
    const rows = Pellucid.selection(samples, memory.query);
    const at = rows.indexOf(sample);
    const target = at < 0 ? rows[0] : rows[at + by];
    if (target !== undefined) go(link({ run, step, page: "token", sample: target }), { replace: true });
  }

  function shellKeys({ run, route, step, steps, compared, onHelp }) {
    const show = (target) => (target === undefined || target === step ? false : go(atStep(run.id, route, target)));
    const tab = (page) => (page !== "run" && step === null ? false : go(tabLink(page, run.id, step, page === "run" ? { with: compared } : null)));
    const keys = {
      "[": () => show(before(steps, step)), "]": () => show(after(steps, step)),
      "{": () => show(steps[0]), "}": () => show(steps.at(-1)), "?": onHelp,
      Escape: () => (document.activeElement?.matches("input, select") ? document.activeElement.blur() : false),
    };
    TABS.forEach((page, i) => { keys[String(i + 1)] = () => tab(page); });
    if (route.page === "token") {
      keys.j = () => { nextSample(run.id, step, route.sample, 1).catch(() => {}); };
      keys.k = () => { nextSample(run.id, step, route.sample, -1).catch(() => {}); };
    }
    return run ? keys : { "?": onHelp };
  }

  /** The hash holds the route, so a plain link into the page would leave it. */
  function toContent(event) {
    event.preventDefault();
    document.getElementById("content").focus();
  }

  function App() {
    useSettings();
    const route = useRoute();
    const [help, setHelp] = useState(false);
    const listed = Pellucid.useRuns();
    const runs = listed.runs?.runs ?? [];
    const run = route.run === null ? runs[0] : runs.find(({ id }) => id === route.run);
    const { state, error } = Pellucid.useLive(run?.id ?? null, Boolean(listed.runs?.live));
    const steps = state?.steps ?? [];
    const step = run ? currentStep(run.id, route, steps) : null;
    if (run && state) remember(run.id, route, step);
    const compared = useRef(null);
    if (route.page === "run") compared.current = route.query.with ?? null;
    useKeys(shellKeys({ run, route, step, steps, compared: compared.current, onHelp: () => setHelp(true) }));
    useEffect(() => {
      const inStep = route.page !== "run" && step !== null && `${t("shell.step")} ${step}`;
      document.title = ["Pellucid", run && visibleText(run.name, 40), inStep].filter(Boolean).join(" · ");
    });
    const props = { runId: run?.id, step, sample: route.sample, token: route.token, route, state, runs, live: Boolean(listed.runs?.live) };
    return html`<div class="shell">
      <a class="visually-hidden" href="#content" onClick=${toContent}>${t("shell.skip")}</a>
      <header class="shell-head">
        <a class="shell-name" href=${run ? link({ run: run.id, page: "run" }) : "#/"}>Pellucid</a>
        ${run && html`<${RunChoice} runs=${runs} run=${run} />
          <${Tabs} run=${run.id} step=${step} route=${route} compared=${compared.current} />
          ${state && html`<${Steps} run=${run.id} route=${route} step=${step} steps=${steps} />`}`}
        <span class="shell-end">
          <${Live} state=${state} live=${listed.runs?.live} error=${error ?? listed.error} /><${Settings} onHelp=${() => setHelp(true)} />
        </span>
      </header>
      <main id="content" tabindex="-1">
        ${(listed.error || error) && html`<${Failure} error=${listed.error || error} />`}
        ${listed.runs && !run && html`<${Failure} error=${runs.length ? t("shell.noRun", visibleText(route.run, 40)) : t("shell.noRuns")} />`}
        ${run && html`<${Faults} faults=${state?.faults} />`}
        ${run && (state ? html`<${Page} key=${`${run.id} ${route.page}`} page=${route.page} props=${props} />` : !error && html`<${Loading} />`)}
        ${!listed.runs && !listed.error && html`<${Loading} />`}
      </main>
      ${help && html`<${Pellucid.Help} onClose=${() => setHelp(false)} />`}
      <${Pellucid.Tips} />
    </div>`;
  }

  const root = document.getElementById("app");
  root.replaceChildren();
  Pellucid.render(html`<${App} />`, root);
})();
