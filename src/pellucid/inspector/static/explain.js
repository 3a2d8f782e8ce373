/* How a token came by its gradient: every derived number worked out again from the recorded numbers that it was made of,
   and compared with what is recorded. Pure functions, no DOM; node can load the file too.

   Each line stands by itself: its inputs are recorded numbers where there are any, so a number that was changed shows in the
   line that makes it and in those that use it. Advantages before whitening are not recorded: they are summed from the end. */
(() => {
  "use strict";
  const numbers = typeof module !== "undefined" ? require("./pages/token-numbers.js") : Pellucid.numbers;
  const { ROUNDING, exact, rounded, plus, minus, times, over, exp, root, negative, total, figure, written, line } = numbers;
  const WHITEN_EPS = 1e-8;
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const nothing = () => "";

  // ------------------------------------------------------------------ what a step's samples share
  /** manifest, check and samples: the payloads step.json (its manifest), check.json and samples.json; the last two may be null.
   *  groupSize: samples of a prompt, where known. whole: every sample of the batch was recorded, so minibatches can be counted. */
  function stepOf(manifest, check, samples, groupSize = null) {
    const step = {
      algorithm: manifest.algorithm, recordedWhitening: manifest.whitening ?? null, columns: samples?.columns ?? null,
      whole: Boolean(samples) && samples.rows >= manifest.samples, groupSize, whitening: null,
    };
    if (check?.whitening && check.whitening.whole !== false) step.whitening = check.whitening;
    if (step.whole && step.algorithm.advantage === "reinforce_pp_baseline") step.whitening = whiteningOfGroups(step.columns);
    return step;
  }

  /** {mean, variance} over the samples of each one's reward sum less its group's mean. */
  function whiteningOfGroups({ group_ids: groups, reward_sum: sums }) {
    const found = new Map();
    groups.forEach((group, i) => {
      const entry = found.get(group) ?? { sum: 0, count: 0 };
      found.set(group, { sum: entry.sum + sums[i], count: entry.count + 1 });
    });
    const deviations = sums.map((sum, i) => sum - found.get(groups[i]).sum / found.get(groups[i]).count);
    const mean = deviations.reduce((a, b) => a + b, 0) / sums.length;
    return { mean, variance: deviations.reduce((a, b) => a + (b - mean) ** 2, 0) / sums.length };
  }

  /** What the sample's minibatch is divided by: {actor, critic}, counted over the samples that shared it; null where unknown. */
  function denominators({ algorithm, columns, whole }, sample) {
    if (!whole || !columns.minibatch) return { actor: null, critic: null };
    let tokens = 0, sequences = 0;
    columns.minibatch.forEach((minibatch, i) => {
      if (minibatch !== sample.minibatch) return;
      tokens += columns.length[i];
      sequences += columns.length[i] > 0 ? 1 : 0;
    });
    const actor = { token: tokens, sequence: sequences, constant: sequences * algorithm.max_new_tokens }[algorithm.aggregate];
    return { actor: exact(actor), critic: exact(tokens) };
  }

  // ------------------------------------------------------------------ a sample
  /** What the lines of a sample's tokens share. record: {sample, arrays} as Pellucid.sampleAt gives it; step: of stepOf. */
  function read({ sample, arrays }, step) {
    const actions = [];
    arrays.action_mask.forEach((isAction, t) => { if (isAction) actions.push(t); });
    const told = { sample, arrays, step, algorithm: step.algorithm, actions, last: actions.at(-1), length: actions.length };
    told.chain = ["gae", "reinforce_pp"].includes(step.algorithm.advantage) ? chainOf(told) : null;
    told.group = told.chain ? null : groupOf(told);
    told.denominators = denominators(step, sample);
    if (step.algorithm.policy_loss === "gspo") {
      const mean = over(total(actions.map((t) => exact(arrays.log_ratio[t]))), exact(actions.length));
      told.sequenceRatio = { mean, ratio: exp(mean) };
    }
    return told;
  }

  /** Per action {next, from, delta, later, advantage}, from the end: next is the value beyond it, later the advantage of the
   *  action that follows at `from` (null: the episode ends). What is no action is skipped, as in core/advantages.gae. */
  function chainOf({ arrays, algorithm }) {
    const gae = algorithm.advantage === "gae";
    const decay = exact(algorithm.gamma * (gae ? algorithm.gae_lambda : 1));
    const { action_mask: mask, ended, bootstrap_values: bootstrap, rewards, old_values: values } = arrays;
    const chain = new Array(mask.length);
    let next = exact(gae ? bootstrap[mask.length - 1] : 0), later = exact(0), from = null;
    for (let t = mask.length - 1; t >= 0; t -= 1) {
      if (gae && ended[t]) { next = exact(bootstrap[t]); later = exact(0); from = null; }
      if (!mask[t]) continue;
      const reward = exact(rewards[t]);
      const delta = gae ? minus(plus(reward, times(exact(algorithm.gamma), next)), exact(values[t])) : reward;
      const advantage = plus(delta, times(decay, later));
      chain[t] = { next, from, delta, later, advantage };
      next = gae ? exact(values[t]) : next;
      later = advantage;
      from = t;
    }
    return chain;
  }

  /** The sample among its group's reward sums: {own, sums, baseline, std, raw}; null where not all of them are recorded. */
  function groupOf({ sample, step, algorithm }) {
    if (!step.columns) return null;
    const { group_ids: groups, reward_sum: recorded } = step.columns;
    // The recorded sum may have been rounded in another order than the one that was used.
    const sums = recorded.filter((_, i) => groups[i] === sample.group_ids).map((x) => ({ value: x, slack: ROUNDING * Math.abs(x) }));
    if (!step.whole && sums.length !== step.groupSize) return null;
    const own = exact(sample.reward_sum), sum = total(sums);
    // Equal sums give exactly 0, as in core/advantages: rounding divided by rounding would look like an advantage.
    if (sums.every(({ value }) => value === own.value)) return { own, sums, baseline: own, std: exact(0), raw: exact(0) };
    if (algorithm.advantage === "rloo") {
      const others = over(minus(sum, own), exact(sums.length - 1));
      return { own, sums, baseline: others, raw: minus(own, others) };
    }
    const baseline = over(sum, exact(sums.length)), deviation = minus(own, baseline);
    if (algorithm.advantage !== "grpo") return { own, sums, baseline, raw: deviation };
    const squares = total(sums.map((x) => times(minus(x, baseline), minus(x, baseline))));
    const std = root(over(squares, exact(sums.length - 1)));
    return { own, sums, baseline, std, raw: over(deviation, plus(std, exact(algorithm.grpo_eps))) };
  }

  // ------------------------------------------------------------------ rewards and advantages
  function rewardLines({ arrays, sample, algorithm, last }, t) {
    const [old, ref] = [exact(arrays.old_logprobs[t]), exact(arrays.ref_logprobs[t])];
    const priced = algorithm.kl_in === "reward";
    const penalty = priced ? times(exact(-algorithm.kl_coef), exact(arrays.kl[t])) : exact(0);
    const reward = t === last ? plus(penalty, exact(sample.scores)) : penalty;
    const symbol = [priced && "−β·klₜ", t === last && "score"].filter(Boolean).join(" + ") || "0";
    const numbersOf = () => {
      const terms = [priced && written`−${algorithm.kl_coef} × ${arrays.kl[t]}`, t === last && figure(sample.scores)];
      return terms.filter(Boolean).join(" + ").replace("+ −", "− ");
    };
    const note = t === last ? { key: "token.note.last" } : priced ? null : { key: "token.note.klInLoss" };
    return [
      line("kl", "reward", "klₜ = log π_old − log π_ref", () => written`${old} − ${ref}`, minus(old, ref), arrays.kl[t]),
      line("reward", "reward", `rₜ = ${symbol}`, numbersOf, reward, arrays.rewards[t], note),
    ];
  }

  /** Why the value after t is what it is. */
  function nextNote(t, { from, next }) {
    if (from === null) return { key: next.value === 0 ? "token.note.ends" : "token.note.bootstrap" };
    return from === t + 1 ? { key: "token.note.next", values: [from] } : { key: "token.note.skips", values: [from, from - t - 1] };
  }

  function chainLines({ arrays, algorithm, chain }, t) {
    const { next, delta, later, advantage } = chain[t];
    const { gamma, gae_lambda: lambda } = algorithm, reward = arrays.rewards[t], note = nextNote(t, chain[t]);
    if (algorithm.advantage === "reinforce_pp") {
      return [line("raw_advantage", "advantage", "Gₜ = rₜ + γ·Gₜ₊₁", () => written`${reward} + ${gamma} × ${later}`, advantage, undefined, note)];
    }
    const value = arrays.old_values[t];
    return [
      line("next_value", "advantage", "Vₜ₊₁", nothing, next, undefined, note),
      line("delta", "advantage", "δₜ = rₜ + γ·Vₜ₊₁ − Vₜ", () => written`${reward} + ${gamma} × ${next} − ${value}`, delta),
      line("raw_advantage", "advantage", "Aₜ = δₜ + γλ·Aₜ₊₁", () => written`${delta} + ${gamma * lambda} × ${later}`, advantage),
      line("return", "advantage", "Rₜ = Aₜ + Vₜ", () => written`${advantage} + ${value}`, plus(advantage, exact(value)), arrays.returns[t]),
    ];
  }

  function groupLines({ arrays, sample, actions, group, algorithm }) {
    const kind = algorithm.advantage;
    const sum = total(actions.map((t) => exact(arrays.rewards[t])));
    const lines = [line("reward_sum", "advantage", "S = Σ rₜ", nothing, sum, sample.reward_sum)];
    if (!group) return [...lines, line("raw_advantage", "advantage", "A", nothing, null, undefined, { key: "token.note.groupUnknown" })];
    const { own, baseline, std, raw, sums } = group;
    const ofGroup = { key: "token.note.group", values: [sums.length] };
    const mean = kind === "rloo" ? "b = Σⱼ≠ᵢ Sⱼ / (G − 1)" : "b = Σ Sⱼ / G";
    lines.push(line("baseline", "advantage", mean, nothing, baseline, undefined, ofGroup));
    if (kind !== "grpo") return [...lines, line("raw_advantage", "advantage", "A = S − b", () => written`${own} − ${baseline}`, raw)];
    const numbersOf = () => `${written`(${own} − ${baseline})`} / ${written`(${std} + ${algorithm.grpo_eps})`}`;
    lines.push(line("group_std", "advantage", "σ = √(Σ (Sⱼ − b)² / (G − 1))", nothing, std));
    return [...lines, line("raw_advantage", "advantage", "A = (S − b) / (σ + eps)", numbersOf, raw)];
  }

  /** Mean and variance, with the error that comes from having summed what was recorded. around: the size of the numbers summed. */
  function whitenedBy({ mean, variance }, around) {
    const size = Math.abs(mean) + Math.sqrt(variance) + around;
    return {
      mean: { value: mean, slack: 4 * ROUNDING * size },
      variance: { value: variance, slack: 16 * ROUNDING * (variance + Math.sqrt(variance) * size) },
    };
  }

  function advantageLines(told, t) {
    const { step, arrays, algorithm, chain, group } = told;
    const lines = chain ? chainLines(told, t) : groupLines(told);
    const raw = chain ? chain[t].advantage : group?.raw ?? null, recorded = arrays.advantages[t];
    const whitens = algorithm.advantage === "gae" ? algorithm.whiten_advantages : algorithm.advantage.startsWith("reinforce_pp");
    const letter = { gae: "Aₜ", reinforce_pp: "Gₜ" }[algorithm.advantage] ?? "A";
    if (!whitens) {
      const note = { key: "token.note.notWhitened" };
      return [...lines, line("advantage", "advantage", `Âₜ = ${letter}`, nothing, raw, recorded, note)];
    }
    const used = step.whitening ?? step.recordedWhitening;
    const { mean, variance } = whitenedBy(used ?? { mean: NaN, variance: NaN }, Math.abs(arrays.returns?.[t] ?? 0));
    if (step.whitening && step.recordedWhitening) {
      const note = { key: chain ? "token.note.ofActions" : "token.note.ofSamples" };
      lines.push(line("mean", "advantage", `mean = Σ ${letter} / n`, nothing, mean, step.recordedWhitening.mean, note));
      lines.push(line("variance", "advantage", `var = Σ (${letter} − mean)² / n`, nothing, variance, step.recordedWhitening.variance));
    }
    const whitened = raw && used ? over(minus(raw, mean), root(plus(variance, exact(WHITEN_EPS)))) : null;
    const numbersOf = () => (whitened ? `${written`(${raw} − ${mean})`} / ${written`√(${variance} + 1e−8)`}` : "");
    return [...lines, line("advantage", "advantage", `Âₜ = (${letter} − mean) / √(var + 1e−8)`, numbersOf, whitened, recorded)];
  }

  // ------------------------------------------------------------------ the policy's loss
  /** Where x lies: "inside", "below", "above", or "edge" where float32 may have decided either way. */
  function sideOf({ value, slack }, low, high) {
    const blur = slack + ROUNDING * Math.abs(value);
    if (Math.abs(value - low) <= blur || Math.abs(value - high) <= blur) return "edge";
    return value < low ? "below" : value > high ? "above" : "inside";
  }

  /** The loss of token t before the denominator, and its slope: the derivative by log π. used: the ratio in it, the sequence's
   *  for gspo. why: which branch won, a key. On the edge of a clip the recorded decision stands. */
  function surrogate({ arrays, algorithm, sequenceRatio }, t) {
    const { policy_loss: kind, clip_eps_low, clip_eps_high, dual_clip: dual } = algorithm;
    const [low, high] = [1 - clip_eps_low, 1 + clip_eps_high];
    const used = kind === "gspo" ? sequenceRatio.ratio : exact(arrays.ratio[t]);
    const advantage = exact(arrays.advantages[t]), sign = Math.sign(advantage.value);
    const side = sideOf(used, low, high), recorded = Boolean(arrays.clipped[t]);
    const weight = side === "inside" ? used : rounded(clamp(used.value, low, high), side === "edge" ? used.slack : 0);
    const common = { used, low, high, side, weight, advantage };
    if (kind === "cispo") {
      const slope = negative(times(weight, advantage)), clipped = side === "edge" ? recorded : side !== "inside";
      return { ...common, loss: times(slope, exact(arrays.logprobs[t])), clipped, slope, why: side === "edge" ? side : clipped ? "weight" : "inside" };
    }
    const [unclipped, bounded] = [negative(times(used, advantage)), negative(times(weight, advantage))];
    const hasCeiling = kind === "ppo" && typeof dual === "number" && sign < 0;
    const ceiling = hasCeiling ? times(exact(-dual), advantage) : null;
    const beyond = hasCeiling ? sideOf(used, -Infinity, dual) : "inside";
    if (beyond === "above" || (beyond === "edge" && recorded)) {
      return { ...common, unclipped, bounded, ceiling, loss: ceiling, clipped: true, slope: exact(0), why: "dual" };
    }
    const worse = (sign > 0 && side === "above") || (sign < 0 && side === "below");
    const clipped = side === "edge" ? recorded && sign !== 0 : worse;
    const why = side === "edge" || beyond === "edge" ? "edge" : clipped ? "clipped" : side === "inside" ? "inside" : sign ? "pulledBack" : "zero";
    return { ...common, unclipped, bounded, ceiling, loss: clipped ? bounded : unclipped, clipped, slope: clipped ? exact(0) : unclipped, why };
  }

  /** The KL term of the loss: {now, ref, l, coef, symbol, penalty, slopeSymbol, slope}; null where the KL is in the reward. */
  function klTerm({ arrays, algorithm }, t) {
    if (algorithm.kl_in !== "loss" || !(algorithm.kl_coef > 0)) return null;
    const [now, ref] = [exact(arrays.logprobs[t]), exact(arrays.ref_logprobs[t])];
    const l = minus(now, ref), inverse = exp(negative(l));
    const k3 = plus(minus(inverse, exact(1)), l), k3Slope = minus(exact(1), inverse);
    const [symbol, penalty, slopeSymbol, slope] = {
      k1: ["k1 = l", l, "1", exact(1)],
      k2: ["k2 = l² / 2", times(exact(0.5), times(l, l)), "l", l],
      k3: ["k3 = e^(−l) − 1 + l", k3, "(1 − e^(−l))", k3Slope],
      k3_corrected: ["k3 = e^(−l) − 1 + l", k3, "(k3 + 1 − e^(−l))", plus(k3, k3Slope)],
    }[algorithm.kl_loss];
    return { now, ref, l, coef: exact(algorithm.kl_coef), symbol, penalty, slopeSymbol, slope };
  }

  /** The derivative by log π(t) of the minibatch's loss: {policy, kl, whole, divisor}. */
  function gradientOf({ algorithm, sample, length }, own, kl) {
    const divisor = exact(sample.actor_denominator * (algorithm.aggregate === "sequence" ? length : 1));
    const policy = over(own.slope, divisor);
    const penalty = kl ? over(times(kl.coef, kl.slope), divisor) : exact(0);
    return { policy, kl: penalty, whole: kl ? plus(policy, penalty) : policy, divisor };
  }

  function surrogateLines({ algorithm, arrays }, t, own) {
    const { used, low, high, side, weight, advantage, ceiling, unclipped, bounded, loss, why } = own;
    const range = written`clip(${used}, ${low}, ${high})`;
    const letter = algorithm.policy_loss === "gspo" ? "s" : "ratioₜ", clip = `clip(${letter}, 1 − ε_low, 1 + ε_high)`;
    if (algorithm.policy_loss === "cispo") {
      return [
        line("weight", "policy", `w = ${clip}`, () => range, weight, undefined, { key: `token.note.weight.${side}` }),
        line("loss", "policy", "ℓₜ = −w·Âₜ·log π", () => written`−${weight} × ${advantage} × ${arrays.logprobs[t]}`, loss),
        line("clipped", "policy", "w ≠ ratioₜ", nothing, own.clipped, arrays.clipped[t]),
      ];
    }
    const note = { key: `token.note.loss.${why}` };
    const worst = unclipped.value > bounded.value ? unclipped : bounded;
    return [
      line("unclipped", "policy", `−${letter}·Âₜ`, () => written`−${used} × ${advantage}`, unclipped),
      line("bounded", "policy", `−${clip}·Âₜ`, () => `−${range}${written` × ${advantage}`}`, bounded),
      ...(ceiling ? [
        line("dual_clip", "policy", "−c·Âₜ", () => written`−${algorithm.dual_clip} × ${advantage}`, ceiling),
        line("loss", "policy", "ℓₜ = min(max(−ratioₜ·Âₜ, −clip(…)·Âₜ), −c·Âₜ)", () => written`min(${worst}, ${ceiling})`, loss, undefined, note),
      ] : [line("loss", "policy", `ℓₜ = max(−${letter}·Âₜ, −clip(…)·Âₜ)`, () => written`max(${unclipped}, ${bounded})`, loss, undefined, note)]),
      line("clipped", "policy", `ℓₜ ≠ −${letter}·Âₜ`, nothing, own.clipped, arrays.clipped[t]),
    ];
  }

  function policyLines(told, t) {
    const { arrays, sample, algorithm, length, sequenceRatio } = told;
    const own = surrogate(told, t), kl = klTerm(told, t), gradient = gradientOf(told, own, kl);
    const [now, old, logRatio] = [exact(arrays.logprobs[t]), exact(arrays.old_logprobs[t]), exact(arrays.log_ratio[t])];
    const lines = [
      line("log_ratio", "policy", "log ratioₜ = log π − log π_old", () => written`${now} − ${old}`, minus(now, old), arrays.log_ratio[t]),
      line("ratio", "policy", "ratioₜ = e^(log ratioₜ)", () => written`e^${logRatio}`, exp(logRatio), arrays.ratio[t]),
    ];
    if (sequenceRatio) {
      const { mean, ratio } = sequenceRatio;
      lines.push(line("sequence_ratio", "policy", "s = e^(Σ log ratioₜ / length)", () => written`e^${mean}`, ratio));
    }
    lines.push(...surrogateLines(told, t, own));
    if (kl) {
      lines.push(line("kl_now", "policy", "l = log π − log π_ref", () => written`${kl.now} − ${kl.ref}`, kl.l));
      lines.push(line("kl_penalty", "policy", kl.symbol, nothing, kl.penalty));
    }
    const bySequence = algorithm.aggregate === "sequence", symbol = bySequence ? "(length · N)" : "N";
    const divisor = () => (bySequence ? written`(${length} × ${sample.actor_denominator})` : figure(sample.actor_denominator));
    const [loss, name] = kl ? [plus(own.loss, times(kl.coef, kl.penalty)), kl.symbol.slice(0, 2)] : [own.loss];
    const slope = own.slope.value === 0 && own.clipped ? "0" : { ppo: "−ratioₜ·Âₜ", gspo: "−s·Âₜ", cispo: "−w·Âₜ" }[algorithm.policy_loss];
    const byKl = (first, second) => (kl ? written`(${first} + ${kl.coef} × ${second})` : written`${first}`) + ` / ${divisor()}`;
    const counted = { key: `token.note.counted.${algorithm.aggregate}` };
    return [
      ...lines,
      line("denominator", "policy", "N", nothing, told.denominators.actor, sample.actor_denominator, counted),
      line("loss_share", "policy", kl ? `(ℓₜ + β·${name}) / ${symbol}` : `ℓₜ / ${symbol}`, () => byKl(own.loss, kl?.penalty), over(loss, gradient.divisor)),
      line("gradient", "policy", kl ? `∂L/∂log π = (${slope} + β·${kl.slopeSymbol}) / ${symbol}` : `∂L/∂log π = ${slope} / ${symbol}`,
        () => byKl(own.slope, kl?.slope), gradient.whole, arrays.logprob_grads[t]),
    ];
  }

  // ------------------------------------------------------------------ the critic's loss
  /** {error, square, side, limited, bound, clipped, loss} of the value of token t; limited and bound only where values are clipped. */
  function valueLoss({ arrays, algorithm }, t) {
    const [value, old, target] = [exact(arrays.values[t]), exact(arrays.old_values[t]), exact(arrays.returns[t])];
    const half = (x) => times(exact(0.5), times(x, x)), eps = algorithm.value_clip_eps ?? null;
    const error = minus(value, target), square = half(error), moved = minus(value, old);
    if (eps === null) return { value, old, target, eps, error, square, clipped: false, loss: square };
    const limited = plus(old, rounded(clamp(moved.value, -eps, eps), moved.slack)), bound = half(minus(limited, target));
    const side = sideOf(moved, -eps, eps), tied = Math.abs(bound.value - square.value) <= bound.slack + square.slack;
    const open = side === "edge" || (side !== "inside" && tied);
    const clipped = open ? Boolean(arrays.value_clipped[t]) : side !== "inside" && bound.value > square.value;
    const why = open ? "edge" : clipped ? "clipped" : side === "inside" ? "inside" : "free";
    return { value, old, target, eps, error, square, limited, bound, clipped, loss: clipped ? bound : square, why };
  }

  function criticLines(told, t) {
    const { arrays, sample } = told;
    if (!arrays.values || !arrays.value_grads) return [];
    const { value, old, target, eps, error, square, limited, bound, clipped, loss, why } = valueLoss(told, t);
    const denominator = exact(sample.critic_denominator);
    const first = line("square", "critic", "½(V − R)²", () => written`½(${value} − ${target})²`, square);
    return [
      ...(eps === null ? [first] : [
        line("value_bound", "critic", "V_clip = clip(V, V_old − ε, V_old + ε)", () => written`clip(${value}, ${old} − ${eps}, ${old} + ${eps})`, limited),
        first,
        line("square_bound", "critic", "½(V_clip − R)²", () => written`½(${limited} − ${target})²`, bound),
        line("value_loss", "critic", "max(½(V − R)², ½(V_clip − R)²)", () => written`max(${square}, ${bound})`, loss, undefined, { key: `token.note.value.${why}` }),
      ]),
      line("value_clipped", "critic", "½(V_clip − R)² > ½(V − R)²", nothing, clipped, arrays.value_clipped[t]),
      line("critic_denominator", "critic", "M", nothing, told.denominators.critic, sample.critic_denominator, { key: "token.note.counted.token" }),
      line("value_gradient", "critic", clipped ? "∂L/∂V = 0 / M" : "∂L/∂V = (V − R) / M",
        () => (clipped ? "0" : written`(${value} − ${target})`) + written` / ${denominator}`,
        over(clipped ? exact(0) : error, denominator), arrays.value_grads[t]),
    ];
  }

  // ------------------------------------------------------------------ the story of a token
  const ZEROS = [["reward", "reward", "rewards"], ["advantage", "advantage", "advantages"], ["gradient", "policy", "logprob_grads"], ["value_gradient", "critic", "value_grads"]];

  /** The lines of token t, in the order in which its numbers were made: {id, part, symbol, numbers, result, recorded, agrees, note}.
   *  agrees is null where nothing is recorded, or too little to work it out. What is no action has nothing but zeros. */
  function lines(told, t) {
    if (told.arrays.action_mask[t]) return [...rewardLines(told, t), ...advantageLines(told, t), ...policyLines(told, t), ...criticLines(told, t)];
    return ZEROS.filter(([, , name]) => told.arrays[name])
      .map(([id, part, name]) => line(id, part, "0", nothing, exact(0), told.arrays[name][t], { key: "token.note.noAction" }));
  }

  const SHARED = new Set(["reward_sum", "mean", "variance", "denominator", "critic_denominator"]);

  /** Every line of the sample that contradicts the record, [{token, line}], the earliest in the arithmetic first; of one line the
   *  last token first, as advantages are summed from the end. What is the same for all tokens is listed once. */
  function contradictions(told) {
    const found = [], rank = new Map(), seen = new Set();
    for (let t = told.arrays.action_mask.length - 1; t >= 0; t -= 1) {
      lines(told, t).forEach(({ id, agrees }, i) => {
        if (told.arrays.action_mask[t] || !rank.has(id)) rank.set(id, i);
        if (agrees !== false || seen.has(id)) return;
        if (SHARED.has(id)) seen.add(id);
        found.push({ token: t, line: id });
      });
    }
    return found.sort((a, b) => rank.get(a.line) - rank.get(b.line));
  }

  const made = { stepOf, read, lines, contradictions, surrogate, klTerm, gradientOf };
  if (typeof module !== "undefined") module.exports = made;
  else Pellucid.arithmetic = made;
})();
