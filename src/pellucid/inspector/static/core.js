/* What every page stands on: texts in two languages, one source of payloads, routes, figures, arrays and colours. */
(() => {
  "use strict";
  const { html, h, render, useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback, useErrorBoundary } = htmPreact;

  // ------------------------------------------------------------------ settings: language and theme
  /** localStorage, or nothing where the browser refuses it (file://, private modes). */
  const memory = {
    read(key) {
      try { return localStorage.getItem("pellucid." + key); } catch { return null; }
    },
    write(key, value) {
      try { localStorage.setItem("pellucid." + key, value); } catch { /* it is then not remembered */ }
    },
  };
  const listeners = new Set();
  /** Calls `fn` whenever language or theme changes; returns the function that ends this. */
  const listen = (fn) => { listeners.add(fn); return () => listeners.delete(fn); };
  const changed = () => listeners.forEach((fn) => fn());

  const LANGUAGES = { en: "English", zh: "简体中文" };
  const texts = { en: {}, zh: {} };
  const preferred = memory.read("language") || (navigator.language || "en").slice(0, 2);
  let language = Object.hasOwn(LANGUAGES, preferred) ? preferred : "en";

  function addTexts(byLanguage) {
    for (const code of Object.keys(byLanguage)) Object.assign(texts[code], byLanguage[code]);
  }
  /** The text of `key` in the language in use, with {0}, {1} … filled in; English where there is no translation. */
  function t(key, ...values) {
    const text = texts[language][key] ?? texts.en[key] ?? key;
    return text.replace(/\{(\d)\}/g, (whole, i) => (i in values ? String(values[i]) : whole));
  }
  const hasText = (key) => key in texts.en;
  function setLanguage(code) {
    language = code;
    memory.write("language", code);
    document.documentElement.lang = code === "zh" ? "zh-Hans" : code;
    changed();
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let theme = memory.read("theme") || "auto";
  const isDark = () => (theme === "auto" ? prefersDark.matches : theme === "dark");
  function setTheme(choice) {
    theme = choice;
    memory.write("theme", choice);
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    changed();
  }
  prefersDark.addEventListener("change", changed);

  // ------------------------------------------------------------------ payloads: a server, or a bundle of scripts
  const LIMIT = 96; // payloads kept; the least recently used goes first
  const SETTLED = /\/step\/\d+\/(samples\.json|check\.json|chunk\/)/; // written once, whatever the revision
  const FRESH = /\/(state|metrics)\.json$|^runs\.json$/; // never kept
  const cache = new Map(); // path -> {revision, promise}
  const awaited = new Map(); // path -> resolve, of scripts on their way
  const bundled = "bundle" in document.documentElement.dataset; // set by whoever wrote the bundle, which may lie on a web server too
  let generation = 0;

  window.PellucidData = (path, payload) => {
    awaited.get(path)?.(payload);
    awaited.delete(path);
  };

  function fromBundle(path) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const missing = () => {
        script.remove();
        if (awaited.delete(path)) reject(new Error(t("shell.notInBundle", path)));
      };
      awaited.set(path, resolve);
      script.onload = missing; // the data has arrived before this, unless the file does not hold it
      script.onerror = missing;
      script.src = `data/${path}.js`;
      document.head.append(script);
    });
  }

  async function fromServer(path) {
    let response;
    try {
      response = await fetch(`api/${path}`, { cache: "no-cache" });
    } catch {
      throw Object.assign(new Error(t("shell.unreachable")), { unreachable: true });
    }
    const payload = await response.json().catch(() => null);
    if (response.ok && payload) return payload;
    throw Object.assign(new Error(payload?.error || t("shell.noAnswer", path, response.status)), { status: response.status });
  }

  /** Promise of the payload at `path`. With a revision, one fetched at another revision is fetched again (unless it is settled). */
  function get(path, revision) {
    const load = bundled ? fromBundle : fromServer;
    if (FRESH.test(path)) return load(path);
    const kept = cache.get(path);
    if (kept && (revision === undefined || kept.revision === revision || SETTLED.test(path))) {
      cache.delete(path);
      cache.set(path, kept);
      return kept.promise;
    }
    const entry = { revision, promise: load(path) };
    cache.set(path, entry);
    entry.promise.catch(() => cache.get(path) === entry && cache.delete(path));
    while (cache.size > LIMIT) cache.delete(cache.keys().next().value);
    return entry.promise;
  }

  const source = {
    get,
    /** Drops everything kept, for a run that was rewound (resumed from an earlier step). */
    forget() { cache.clear(); generation += 1; },
    bundled,
  };

  /** {data, error} of the payload at `path` (null: none wanted); the last data stays while a newer revision is on its way. */
  function usePayload(path, revision) {
    const [state, setState] = useState({ path: null, data: null, error: null });
    useEffect(() => {
      if (!path) return undefined;
      let wanted = true;
      get(path, revision).then(
        (data) => wanted && setState((old) => (old.data === data && old.path === path && !old.error ? old : { path, data, error: null })),
        (error) => wanted && setState((old) => ({ path, data: old.path === path ? old.data : null, error })),
      );
      return () => { wanted = false; };
    }, [path, revision, generation]);
    return state.path === path ? state : { data: null, error: null };
  }

  // ------------------------------------------------------------------ routes
  /** {run, step, page, sample, token, query} of a hash such as "#/run/0/step/12/sample/5/token/33?stop=length". */
  function parseRoute(hash) {
    const [path, search] = hash.replace(/^#/, "").split("?", 2);
    const parts = path.split("/").filter(Boolean).map(unescaped);
    const named = {};
    for (let i = 0; i < parts.length; i += 2) named[parts[i]] = parts[i + 1];
    const whole = (name) => (/^\d{1,9}$/.test(named[name] ?? "") ? Number(named[name]) : null);
    const [step, sample, token] = [whole("step"), whole("sample"), whole("token")];
    const page = step === null ? "run" : sample !== null ? "token" : "samples" in named ? "samples" : "step";
    return { run: named.run ?? null, step, sample, token, page, query: Object.fromEntries(new URLSearchParams(search || "")) };
  }
  function unescaped(part) {
    try { return decodeURIComponent(part); } catch { return part; }
  }

  /** The hash of a place; `query` entries that are null or "" are left out. */
  function link({ run, step, page, sample, token, query }) {
    let path = `#/run/${encodeURIComponent(run ?? "0")}`;
    if (step !== null && step !== undefined && page !== "run") {
      path += `/step/${step}`;
      if (page === "samples") path += "/samples";
      else if (sample !== null && sample !== undefined && page !== "step") {
        path += `/sample/${sample}`;
        if (token !== null && token !== undefined) path += `/token/${token}`;
      }
    }
    const filled = Object.entries(query || {}).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const search = new URLSearchParams(filled).toString();
    return search ? `${path}?${search}` : path;
  }
  /** Goes to a place; with {replace: true} the history does not grow (filters while typing, tokens by arrow keys). */
  function go(place, { replace = false } = {}) {
    if (replace) location.replace(place);
    else location.hash = place;
  }

  // ------------------------------------------------------------------ keys
  const keyMaps = [];
  /** Handles keys while the component is mounted: {"j": fn, "ArrowLeft": fn}. A handler that returns false passes the key on. */
  function useKeys(map) {
    const current = useRef(map);
    current.current = map;
    useEffect(() => {
      keyMaps.push(current);
      return () => { keyMaps.splice(keyMaps.indexOf(current), 1); };
    }, []);
  }
  function pressed(event) {
    if (document.querySelector("dialog[open]")) return; // a dialog has its own keys
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const typing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]");
    if (typing && event.key !== "Escape") return;
    for (let i = keyMaps.length - 1; i >= 0; i -= 1) {
      const handler = keyMaps[i].current[event.key];
      if (handler && handler(event) !== false) { event.preventDefault(); return; }
    }
  }
  document.addEventListener("keydown", pressed);

  // ------------------------------------------------------------------ arrays
  const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u1: Uint8Array };
  /** The typed array of {dtype, data: base64 of little-endian values}. */
  function decode({ dtype, data }) {
    const text = atob(data);
    const raw = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) raw[i] = text.charCodeAt(i);
    return new TYPES[dtype](raw.buffer);
  }

  const CHUNK = 16;
  const decoded = new WeakMap(); // sample of a chunk -> its arrays
  /** {sample, arrays, pieces, widths} of a row of samples.json; widths[name] is k for arrays of T·k values. */
  async function sampleAt(run, step, row) {
    const base = `run/${run}/step/${step}`;
    const chunk = await get(`${base}/chunk/${Math.floor(row / CHUNK)}.json`).catch(async (error) => {
      const samples = await get(`${base}/samples.json`).catch(() => null);
      throw samples && row >= samples.rows ? new Error(t("shell.noSample", row, step)) : error; // a reader asked for a sample
    });
    const sample = chunk.samples[row % CHUNK];
    if (!sample) throw new Error(t("shell.noSample", row, step));
    if (!decoded.has(sample)) {
      const arrays = {}, widths = {};
      for (const [name, packed] of Object.entries(sample.arrays)) {
        arrays[name] = decode(packed);
        if (packed.k) widths[name] = packed.k;
      }
      decoded.set(sample, { arrays, widths });
    }
    return { sample, pieces: chunk.pieces, ...decoded.get(sample) };
  }

  window.Pellucid = {
    html, h, render, useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback, useErrorBoundary,
    memory, listen, LANGUAGES, addTexts, t, hasText, setLanguage, setTheme, isDark,
    get language() { return language; },
    get theme() { return theme; },
    source, usePayload, parseRoute, link, go, useKeys, keys: { use: useKeys, maps: keyMaps }, decode, sampleAt,
    pages: {}, glossary: {},
  };
  setLanguage(language);
  setTheme(theme);
})();
