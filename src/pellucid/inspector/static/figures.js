/* Figures as text, and figures as colours. */
(() => {
  "use strict";
  const MINUS = "\u2212";
  const minus = (text) => text.replace(/-/g, MINUS);
  const grouped = (digits) => digits.replace(/\B(?=(\d{3})+(?!\d))/g, ",");

  /** Four significant digits, integers in full; a real minus sign; "–" for what is not defined. */
  function format(x) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (typeof x === "boolean") return x ? "1" : "0";
    if (typeof x !== "number") return String(x);
    const size = Math.abs(x);
    const sign = x < 0 ? MINUS : "";
    if (size === Infinity) return `${sign}∞`;
    if (size === 0) return "0";
    if (Number.isInteger(x) && size < 1e9) return sign + grouped(String(size));
    if (size >= 1e6 || size < 1e-4) return minus(x.toExponential(3).replace(/\.?0*e\+?/, "e"));
    if (size >= 1000) return sign + grouped(size.toFixed(0));
    return sign + size.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  }

  /** A duration in seconds, with the unit that suits it. */
  function seconds(x) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (x < 0) return MINUS + seconds(-x);
    if (x === 0) return "0 s";
    if (x < 1e-3) return `${format(Number((x * 1e6).toPrecision(3)))} µs`;
    if (x < 1) return `${format(Number((x * 1e3).toPrecision(3)))} ms`;
    if (x < 120) return `${format(Number(x.toPrecision(3)))} s`;
    const two = (n) => String(Math.floor(n)).padStart(2, "0");
    if (x < 7200) return `${Math.floor(x / 60)} min ${two(x % 60)} s`;
    return `${grouped(String(Math.floor(x / 3600)))} h ${two((x % 3600) / 60)} min`;
  }

  /** A size in bytes, in binary units. */
  function bytes(x) {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let i = 0;
    while (x >= 1024 && i < units.length - 1) { x /= 1024; i += 1; }
    return `${format(Number(x.toPrecision(3)))} ${units[i]}`;
  }

  // Ends and middles of the two scales, as [r, g, b], in light and in dark.
  const SCALES = {
    light: { up: [33, 102, 172], down: [200, 92, 12], middle: [255, 255, 255], low: [240, 248, 246], high: [6, 84, 84] },
    dark: { up: [88, 160, 232], down: [236, 140, 60], middle: [30, 34, 40], low: [30, 38, 42], high: [130, 222, 208] },
  };
  const mix = (a, b, share) => a.map((value, i) => Math.round(value + (b[i] - value) * share));
  function luminance(rgb) {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  /** Black or white, whichever reads better: the better of the two is never below a contrast of 4.5. */
  function painted(rgb) {
    const light = luminance(rgb);
    return { background: `rgb(${rgb.join(" ")})`, color: 1.05 / (light + 0.05) > (light + 0.05) / 0.05 ? "#fff" : "#000" };
  }
  const clamp = (x) => Math.min(1, Math.max(0, x));
  const scale = () => SCALES[Pellucid.isDark() ? "dark" : "light"];

  /** Blue above 0, orange below, the page's ground at 0; full colour at ±limit. {} where x is not a number. */
  function diverging(x, limit) {
    if (x === null || x === undefined || Number.isNaN(x)) return {};
    const { up, down, middle } = scale();
    const share = limit > 0 ? clamp(Math.abs(x) / limit) : x === 0 ? 0 : 1;
    return painted(mix(middle, x < 0 ? down : up, share));
  }
  /** One hue, from the ground (low) to full (high). {} where x is not a number. */
  function sequential(x, low, high) {
    if (x === null || x === undefined || Number.isNaN(x)) return {};
    const ends = scale();
    return painted(mix(ends.low, ends.high, high > low ? clamp((x - low) / (high - low)) : 0));
  }
  /** The value of a CSS variable in the theme in use, for canvases. */
  const cssValue = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  /** Series i: a colour (CSS variable) and a dash, so that colour is not the only difference. */
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2], [12, 4], [4, 4]];
  const seriesStyle = (i) => ({ colour: `--series-${i % 8}`, dash: DASHES[Math.floor(i / 8) % 8] });

  Object.assign(Pellucid, { format, seconds, bytes, diverging, sequential, cssValue, seriesStyle });
})();
