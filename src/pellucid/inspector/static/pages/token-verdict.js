/* What the last epoch's step wanted of a token, and why, as texts to be put together. No DOM; node can load it too. */
(() => {
  "use strict";
  const { surrogate, klTerm, gradientOf } = typeof module !== "undefined" ? require("../explain.js") : Pellucid.arithmetic;
  const say = (key, ...values) => ({ key: `token.why.${key}`, values });

  /** {push: "up" | "down" | "none", parts: [{key, values}]} for token t of `told` (arithmetic.read): sentences, the verdict first.
   *  values are numbers. push is the way in which the gradient moves the token's log-prob: against its sign. */
  function verdict(told, t) {
    const { arrays } = told;
    if (!arrays.action_mask[t]) return { push: "none", parts: [say(arrays.response_mask[t] ? "environment" : "prompt")] };
    const own = surrogate(told, t), kl = klTerm(told, t), gradient = gradientOf(told, own, kl), slope = gradient.whole.value;
    if (!Number.isFinite(slope)) return { push: "none", parts: [say("notFinite", slope)] };
    const push = slope < 0 ? "up" : slope > 0 ? "down" : "none";
    const parts = [say(push, slope), ...advantageReason(told, t, own.advantage.value), ...ratioReason(told, own)];
    if (kl) parts.push(...klReason(gradient, kl));
    return { push, parts };
  }

  function advantageReason({ arrays, algorithm, chain, group, step }, t, advantage) {
    const sign = advantage > 0 ? "positive" : "negative";
    const mean = (step.whitening ?? step.recordedWhitening)?.mean;
    if (algorithm.advantage === "gae") {
      const [worth, expected] = [arrays.returns[t], arrays.old_values[t]];
      const raw = chain[t].advantage.value;
      if (advantage === 0) return [say("zero.gae", worth, expected)];
      const against = raw > 0 !== advantage > 0; // whitening turned the sign
      return [say(`${against ? "turned" : "gae"}.${sign}`, advantage, worth, expected, against ? mean : chain[t].delta.value)];
    }
    if (algorithm.advantage === "reinforce_pp") {
      return [advantage === 0 ? say("zero.reinforce", mean) : say(`reinforce.${sign}`, advantage, chain[t].advantage.value, mean)];
    }
    if (!group) return [advantage === 0 ? say("zero.plain") : say(`plain.${sign}`, advantage)];
    const { own, baseline, sums } = group;
    if (advantage === 0) return [say(sums.every(({ value }) => value === own.value) ? "zero.group" : "zero.plain", own.value)];
    return [say(`${algorithm.advantage === "rloo" ? "others" : "group"}.${sign}`, advantage, own.value, baseline.value, sums.length)];
  }

  function ratioReason({ algorithm }, { why, used, low, high, advantage, weight }) {
    const whose = algorithm.policy_loss === "gspo" ? "sequence." : "";
    const direction = advantage.value > 0 ? "up" : "down";
    if (why === "zero" || advantage.value === 0) return [];
    if (why === "weight") return [say("weight", used.value, weight.value)];
    if (why === "dual") return [say("dual", used.value, algorithm.dual_clip)];
    if (why === "inside") return [Math.abs(used.value - 1) < 1e-6 ? say(`${whose}one`) : say(`${whose}inside`, used.value, low, high)];
    if (why === "edge") return [say("edge", used.value, low, high)];
    return [say(`${whose}${why}.${direction}`, used.value, advantage.value > 0 === (why === "clipped") ? high : low)];
  }

  /** Whether the KL term works with the rest, against it, or alone. */
  function klReason(gradient, kl) {
    const [policy, penalty] = [gradient.policy.value, gradient.kl.value];
    if (penalty === 0) return [];
    const direction = penalty < 0 ? "up" : "down";
    if (policy === 0) return [say(`kl.only.${direction}`, penalty, kl.l.value)];
    return [say(`kl.${Math.sign(policy) === Math.sign(penalty) ? "with" : "against"}.${direction}`, penalty, kl.l.value, policy)];
  }

  if (typeof module !== "undefined") module.exports = { verdict };
  else Pellucid.arithmetic.verdict = verdict;
})();
