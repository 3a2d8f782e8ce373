/* What benchmarks/inspector.py runs inside the page: when the content was there and drawn, and how long frames and answers
   take. Milliseconds of performance.now(), which counts from the start of the navigation. */
(() => {
  "use strict";
  const DEADLINE = 20000, QUIET = 500;
  const frame = () => new Promise(requestAnimationFrame);
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const one = (selector) => document.querySelector(selector);
  const rounded = (ms) => Math.round(10 * ms) / 10;

  /** The time at the start of the second frame from now: by then the first has been drawn. */
  async function drawn() {
    await frame();
    await frame();
    return performance.now();
  }

  /** Resolves as soon as `test()` holds; asked after every change of the document. */
  function until(test, what) {
    return new Promise((resolve, reject) => {
      if (test()) { resolve(); return; }
      const watcher = new MutationObserver(() => test() && end(resolve));
      const timer = setTimeout(() => end(reject, new Error(`${what}: not within ${DEADLINE / 1000} s`)), DEADLINE);
      function end(how, value) {
        watcher.disconnect();
        clearTimeout(timer);
        how(value);
      }
      watcher.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
    });
  }

  // ------------------------------------------------------------------ the first paint
  /** {paint, content, settled: ms, counts: elements of each selector, payloads: {path: bytes}, code: bytes} of a page whose
   *  content is the elements `selectors`. settled: nothing has changed since, and nothing is on its way. */
  async function load(selectors) {
    let changed = 0;
    new MutationObserver(() => { changed = performance.now(); }).observe(document, { subtree: true, childList: true, characterData: true });
    const seen = (selector) => one(selector)?.getBoundingClientRect().height > 0;
    await until(() => selectors.every(seen), `the content (${selectors.join(", ")})`);
    const content = await drawn();
    const asked = () => performance.getEntriesByType("resource");
    const last = () => Math.max(changed, ...asked().map(({ responseEnd }) => responseEnd));
    while (performance.now() - last() < QUIET) await pause(100);
    const api = asked().filter(({ name }) => name.includes("/api/"));
    const size = (entries) => entries.reduce((sum, { decodedBodySize }) => sum + decodedBodySize, 0);
    return {
      paint: rounded(performance.getEntriesByName("first-contentful-paint")[0].startTime),
      content: rounded(content), settled: rounded(Math.max(last(), content)),
      counts: selectors.map((selector) => document.querySelectorAll(selector).length),
      payloads: Object.fromEntries(api.map(({ name, decodedBodySize }) => [name.split("/api/")[1], decodedBodySize])),
      code: size(performance.getEntriesByType("navigation")) + size(asked()) - size(api),
    };
  }

  // ------------------------------------------------------------------ the table of samples
  const ROW = ".samples-table tbody tr:not(.samples-spacer)";
  const box = () => one(".samples-scroll");

  /** Whether rows are seen at the top, in the middle and at the bottom of the box. */
  function filled() {
    const { left, top, width } = box().getBoundingClientRect();
    const head = one(".samples-table thead").offsetHeight, height = box().clientHeight;
    return [head + 5, height / 2, height - 5].every((y) => document.elementFromPoint(left + width / 3, top + y)?.closest(ROW));
  }

  /** {frames: ms each, blank: frames without rows, rows: number of the last row seen} of a pass through the table in `seconds`. */
  async function scroll(seconds) {
    const channel = new MessageChannel();
    const length = box().scrollHeight - box().clientHeight, frames = [];
    let blank = 0, before = await frame();
    const started = before;
    while (before - started < 1000 * seconds) {
      const now = await frame();
      frames.push(rounded(now - before));
      before = now;
      // A message comes when the frame has been drawn: what is asked is what was seen, and the move falls to the next frame.
      await new Promise((resolve) => { channel.port1.onmessage = resolve; channel.port2.postMessage(null); });
      if (!filled()) blank += 1;
      box().scrollTop = length * Math.min(1, (now - started) / (1000 * seconds));
    }
    await drawn();
    return { frames, blank, rows: Number([...document.querySelectorAll(ROW)].at(-1).getAttribute("aria-rowindex")) - 1 };
  }

  /** For each of `count` jumps all over the table: ms until rows were seen and drawn; null where two frames were not enough. */
  async function jumps(count) {
    const length = box().scrollHeight - box().clientHeight, times = [];
    for (let i = 1; i <= count; i += 1) {
      await pause(100);
      const started = performance.now();
      box().scrollTop = length * ((0.618 * i) % 1);
      const ended = await drawn();
      times.push(filled() ? rounded(ended - started) : null);
    }
    return times;
  }

  /** ms from the click on each column's head until the rows were sorted and drawn. Each column is sorted both ways. */
  async function sort(columns) {
    const times = [];
    for (const column of columns.flatMap((name) => [name, name])) {
      await pause(300);
      const head = () => one(`th.samples-${column}`).ariaSort, before = head(), started = performance.now();
      one(`th.samples-${column} button`).click();
      await until(() => head() !== before && one(ROW), `the table sorted by ${column}`);
      times.push(rounded((await drawn()) - started));
    }
    return times;
  }

  /** ms from the last key of each text until the rows with it, then all rows again, were drawn. */
  async function filter(texts) {
    const times = [];
    for (const text of texts.flatMap((wanted) => [wanted, ""])) {
      await pause(300);
      const input = one(".samples-filters input[type=search]"), count = () => one(".samples-count").textContent;
      const before = count(), started = performance.now();
      input.value = text;
      input.dispatchEvent(new InputEvent("input", { bubbles: true }));
      await until(() => count() !== before, `the rows with ${text}`);
      times.push(rounded((await drawn()) - started));
    }
    return times;
  }

  // ------------------------------------------------------------------ the story of a token
  /** `count` tokens, evenly over the response. */
  function tokens(count) {
    const actions = [...document.querySelectorAll("a.token:not(.token-plain)")].map((token) => Number(token.dataset.t));
    return Array.from({ length: count }, (_, i) => actions[Math.round((i * (actions.length - 1)) / Math.max(count - 1, 1))]);
  }

  /** Scrolls to a token and waits for a click on it, of which `answer` will be the ms. Returns where to click. */
  function awaitClick(t) {
    const token = one(`a.token[data-t="${t}"]`), title = () => one(".token-story h2").textContent, before = title();
    token.scrollIntoView({ block: "center" });
    Probe.answer = new Promise((resolve, reject) => {
      addEventListener("click", async ({ timeStamp }) => {
        try {
          await until(() => title() !== before && token.getAttribute("aria-current") === "true", `the story of token ${t}`);
          resolve(rounded((await drawn()) - timeStamp));
        } catch (error) { reject(error); }
      }, { capture: true, once: true });
    });
    const { x, y, width, height } = token.getClientRects()[0];
    return { x: x + width / 2, y: y + height / 2 };
  }

  window.Probe = { load, scroll, jumps, sort, filter, tokens, awaitClick, answer: null };
})();
