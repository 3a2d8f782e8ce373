/* The quantities of the record: what each one is, its formula and its unit. Names are those of the files. */
(() => {
  "use strict";
  // name: [unit, formula, English, Chinese]
  const TERMS = {
    input_ids: ["id", "", "Token ids of prompt and response.", "提示与回答的 token 编号。"],
    attention_mask: ["bool", "", "True for tokens, false for padding.", "token 处为真，填充处为假。"],
    position_ids: ["tokens", "", "Position of a token in its sequence, from 0.", "token 在序列中的位置，从 0 开始。"],
    response_mask: ["bool", "", "True for the tokens after the prompt.", "提示之后的 token 为真。"],
    action_mask: ["bool", "", "True for the tokens that the policy sampled and is trained on. A sampled end-of-sequence token is one.", "策略采样并据以训练的 token 为真；采样得到的结束符也算在内。"],
    ended: ["bool", "", "The episode stops after this token.", "回合在此 token 之后结束。"],
    bootstrap_values: ["reward", "", "Value of what lies beyond the last token: 0 where the episode terminated.", "最后一个 token 之后的价值；回合终止时为 0。"],
    rollout_logprobs: ["nats", "log π_engine(token t | tokens before t)", "Log-probability under the engine that sampled the token, at sampling.", "采样引擎在采样时给出的对数概率。"],
    old_logprobs: ["nats", "log π_old(token t | tokens before t)", "Log-probability under the actor before this step's updates.", "本步更新之前，actor 给出的对数概率。"],
    ref_logprobs: ["nats", "log π_ref(token t | tokens before t)", "Log-probability under the frozen reference model.", "冻结的参考模型给出的对数概率。"],
    logprobs: ["nats", "log π(token t | tokens before t)", "Log-probability under the actor in the last epoch, before the optimizer step of this sample's minibatch.", "最后一轮中、该样本所在小批量的优化步之前，actor 给出的对数概率。"],
    log_ratio: ["nats", "logprobs − old_logprobs", "How much likelier the token has become since it was sampled, as a logarithm.", "token 自采样以来概率变化的对数。"],
    ratio: ["–", "exp(logprobs − old_logprobs)", "How many times likelier the token has become since it was sampled.", "token 自采样以来概率变为原来的多少倍。"],
    kl: ["nats", "k1 = old_logprobs − ref_logprobs", "One-sample estimate of the Kullback-Leibler divergence from the reference; negative for single tokens is normal.", "与参考模型的 KL 散度的单样本估计；单个 token 为负属正常。"],
    entropy: ["nats", "−Σ_v π(v) log π(v)", "Spread of the whole next-token distribution; 0 where only one token is possible.", "整个下一 token 分布的熵；只有一种可能时为 0。"],
    scores: ["reward", "", "What the reward source said of the whole response.", "奖励来源对整个回答的评分。"],
    rewards: ["reward", "−kl_coef · kl, plus the score on the last action", "Reward per token, after the KL penalty.", "扣除 KL 惩罚之后的逐 token 奖励。"],
    old_values: ["reward", "V_old(state before t)", "The critic's prediction of the return, before this step's updates.", "本步更新之前，critic 对回报的预测。"],
    values: ["reward", "V(state before t)", "The critic's prediction in the last epoch, before its optimizer step.", "最后一轮优化步之前，critic 的预测。"],
    returns: ["reward", "raw advantages + old_values", "What the critic is trained to predict.", "critic 的训练目标。"],
    advantages: ["–", "A_t = δ_t + γλ A_{t+1};  δ_t = r_t + γ V_{t+1} − V_t", "How much better the action turned out than was expected; as trained on, so whitened where configured.", "动作的结果比预期好多少；为训练所用的值，若有配置则已白化。"],
    whitening: ["–", "(x − mean) / √(variance + 1e−8)", "Shift and scale of the raw advantages to mean 0 and variance 1 over the action tokens of the whole batch.", "把原始优势在整个批次的动作 token 上平移缩放为均值 0、方差 1。"],
    clipped: ["bool", "", "The bound on the ratio replaced the ratio: this token has no gradient (with ppo).", "比率被界限取代：此 token 没有梯度（ppo 时）。"],
    value_clipped: ["bool", "", "The clipped term of the value loss is the larger: this token does not move the critic.", "价值损失取了截断项：此 token 不推动 critic。"],
    logprob_grads: ["–", "∂ loss / ∂ logprobs[t]", "The push on this token's log-probability; negative makes the token likelier.", "对该 token 对数概率的推力；为负时该 token 变得更可能。"],
    value_grads: ["–", "∂ value loss / ∂ values[t]", "The push on the critic's value here; negative raises it.", "对该处价值的推力；为负时价值升高。"],
    top_logprobs: ["nats", "", "The likeliest tokens at this place and their log-probabilities, before the update.", "更新之前，此处最可能的 token 及其对数概率。"],
    group_ids: ["index", "", "Index of the prompt in this step; the samples of one prompt are a group.", "提示在本步中的序号；同一提示的样本为一组。"],
    prompt_id: ["index", "", "Position of the prompt in the data set, the same in every step.", "提示在数据集中的位置，各步相同。"],
    sample_index: ["index", "", "Which of the samples of its prompt this is.", "该提示的第几个样本。"],
    policy_version: ["version", "", "Version of the weights that sampled the response: step − 1.", "采样该回答的权重版本：步号 − 1。"],
    stop_reason: ["", "", "stop: ended by a stop token. length: cut at max_new_tokens.", "stop：由结束符终止。length：达到 max_new_tokens 被截断。"],
    length: ["tokens", "Σ action_mask", "Number of actions.", "动作数。"],
    kl_sequence: ["nats", "Σ_t kl", "KL of the whole response from the reference.", "整个回答相对参考模型的 KL。"],
    reward_sum: ["reward", "Σ_t rewards", "Score less the KL penalty of the whole response.", "评分减去整个回答的 KL 惩罚。"],
    advantage_mean: ["–", "", "Mean advantage over the actions.", "各动作优势的均值。"],
    entropy_mean: ["nats", "", "Mean entropy over the actions.", "各动作熵的均值。"],
    clipped_share: ["share", "", "Share of the actions whose ratio was clipped.", "比率被截断的动作所占份额。"],
    minibatch: ["index", "", "Optimizer step of the last epoch that held this sample, from 0.", "最后一轮中包含此样本的优化步，从 0 开始。"],
    num_action_tokens: ["tokens", "", "Actions of the whole batch.", "整个批次的动作数。"],
    actor_denominator: ["–", "", "What the actor loss of this sample's minibatch was divided by.", "此样本所在小批量的 actor 损失的除数。"],
    critic_denominator: ["–", "", "What the critic loss of this sample's minibatch was divided by.", "此样本所在小批量的 critic 损失的除数。"],
  };
  const UNITS = {
    en: { nats: "nats", tokens: "tokens", reward: "reward units", share: "share", "–": "none", id: "token id", bool: "true or false", index: "index from 0", version: "version" },
    zh: { nats: "奈特（nat）", tokens: "token", reward: "奖励单位", share: "份额", "–": "无", id: "token 编号", bool: "真或假", index: "序号，从 0 开始", version: "版本" },
  };

  /** An entry whose text and unit follow the language in use. */
  function define(name, unit, formula, en, zh) {
    Pellucid.addTexts({ en: { [`term.${name}`]: en }, zh: { [`term.${name}`]: zh } });
    Pellucid.glossary[name] = {
      formula,
      get text() { return Pellucid.t(`term.${name}`); },
      get unit() { return UNITS[Pellucid.language][unit] ?? unit; },
    };
  }
  for (const [name, entry] of Object.entries(TERMS)) define(name, ...entry);
  Pellucid.defineTerm = define;
})();
