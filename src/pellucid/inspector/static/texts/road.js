/* Which chapter of the road explains a quantity. */
(() => {
  "use strict";
  const CHAPTERS = {
    "1-trajectory": ["ended", "bootstrap_values", "returns", "length", "stop_reason"],
    "2-policy-gradient": ["logprobs", "logprob_grads", "entropy", "entropy_mean", "policy/entropy", "actor/policy_loss"],
    "3-actor-critic": [
      "old_values", "values", "value_grads", "advantages", "advantage_mean", "whitening", "advantages/abs", "critic/value", "critic/return",
      "critic/explained_variance", "critic/value_loss",
    ],
    "4-ppo": [
      "old_logprobs", "log_ratio", "ratio", "clipped", "clipped_share", "value_clipped", "minibatch", "actor/ratio", "actor/approx_kl", "actor/clip_fraction",
      "actor/log_ratio_max", "actor/first_ratio_error", "critic/clip_fraction",
    ],
    "5-language-model": ["input_ids", "action_mask", "response_mask", "top_logprobs", "num_action_tokens", "rollout/length"],
    "6-reward-model": ["scores", "score/mean", "score/std", "score/max", "train/pair_loss", "eval/pair_loss", "train/accuracy", "eval/accuracy", "train/margin", "eval/margin", "eval/score"],
    "7-kl": ["ref_logprobs", "kl", "kl_sequence", "rewards", "reward_sum", "kl/sequence", "kl/token", "kl/coef", "actor/kl_loss", "eval/kl", "eval/judge"],
    "8-data-flow": [
      "rollout_logprobs", "policy_version", "rollout/parity_max", "rollout/parity_p99", "rollout/parity_mean", "time/generate", "time/score", "time/old_logprobs",
      "time/ref_logprobs", "time/values", "time/advantages",
    ],
  };
  const CHAPTER = Object.fromEntries(Object.entries(CHAPTERS).flatMap(([slug, names]) => names.map((name) => [name, slug])));
  /** The page of the chapter in which a quantity is explained, as [number, address]; or null. */
  Pellucid.chapterOf = (name) => Object.hasOwn(CHAPTER, name) ? [CHAPTER[name][0], `learn/${Pellucid.language}/${CHAPTER[name]}.html`] : null;
  Pellucid.roadMap = () => `learn/README${Pellucid.language === "zh" ? ".zh" : ""}.html`;
})();
