/* Numbers that know how far float32 may have been off, and how they are written into a formula. No DOM; node can load it too. */
(() => {
  "use strict";

  /** Float32 rounds every operation to within 2^-24 of its result. Four times that covers what a record cannot tell: exp and
   *  rsqrt of another library, the order of a sum, a constant such as γλ that was rounded before use. Each number below
   *  carries the error that could follow for it, its slack; a recorded number that is further off is a contradiction. */
  const ROUNDING = 4 * 2 ** -24;
  const SMALLEST = 1e-37; // where float32 begins to lose digits

  const exact = (value) => ({ value, slack: 0 });
  const rounded = (value, slack) => ({ value, slack: slack + ROUNDING * Math.abs(value) });
  const plus = (a, b) => rounded(a.value + b.value, a.slack + b.slack);
  const minus = (a, b) => rounded(a.value - b.value, a.slack + b.slack);
  const times = (a, b) => rounded(a.value * b.value, Math.abs(a.value) * b.slack + Math.abs(b.value) * a.slack);
  const over = (a, b) => rounded(a.value / b.value, (a.slack + Math.abs(a.value / b.value) * b.slack) / Math.abs(b.value));
  const exp = (a) => rounded(Math.exp(a.value), Math.exp(a.value) * a.slack);
  const root = (a) => rounded(Math.sqrt(a.value), a.value > 0 ? a.slack / (2 * Math.sqrt(a.value)) : Math.sqrt(a.slack));
  const negative = ({ value, slack }) => ({ value: -value, slack });
  const total = (all) => ({
    value: all.reduce((sum, x) => sum + x.value, 0),
    slack: all.reduce((sum, x) => sum + x.slack + 2 * ROUNDING * Math.abs(x.value), 0),
  });

  /** Whether float32 could have recorded this number for that result. */
  function close({ value, slack }, recorded) {
    const single = Math.fround(value); // float32 has no room for 1e39: it recorded inf
    if (!Number.isFinite(single) || !Number.isFinite(recorded)) return Object.is(single, recorded);
    return Math.abs(value - recorded) <= slack + SMALLEST;
  }

  /** Five significant digits, a real minus sign. */
  function figure(x) {
    if (!Number.isFinite(x)) return Number.isNaN(x) ? "nan" : x > 0 ? "∞" : "−∞";
    const size = Math.abs(x);
    const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? x.toExponential(3) : String(Number(x.toPrecision(5)));
    return text.replace("e+", "e").replace(/-/g, "−");
  }

  /** A template tag: writes numbers into a formula. One that is negative and follows an operator gets parentheses. */
  function written(pieces, ...numbers) {
    return pieces.reduce((text, piece, i) => {
      const number = figure(numbers[i - 1]?.value ?? numbers[i - 1]);
      const needs = number[0] === "−" && /\S\s*$/.test(text) && !/[(,]\s*$/.test(text);
      return text + (needs ? `(${number})` : number) + piece;
    });
  }

  /** One line of arithmetic. result: {value, slack}, a boolean, or null where it cannot be worked out. recorded: undefined where
   *  nothing is. numbers: a function, as most lines are only checked and never shown. agrees: null where there is nothing to compare. */
  function line(id, part, symbol, numbers, result, recorded, note = null) {
    const isFlag = typeof result === "boolean";
    const agrees = recorded === undefined || result === null ? null : isFlag ? result === Boolean(recorded) : close(result, recorded);
    return {
      id, part, symbol, get numbers() { return numbers(); }, result: isFlag || result === null ? result : result.value,
      recorded: isFlag && recorded !== undefined ? Boolean(recorded) : recorded, agrees, note,
    };
  }

  const made = { ROUNDING, exact, rounded, plus, minus, times, over, exp, root, negative, total, close, figure, written, line };
  if (typeof module !== "undefined") module.exports = made;
  else Pellucid.numbers = made;
})();
