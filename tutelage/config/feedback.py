"""Sections of the stages that learn from what people or rewards say of answers."""

from __future__ import annotations

from typing import Literal

from tutelage.config.base import Names, artifact, setting
from tutelage.config.rewards import Rewards
from tutelage.config.train import Count, Positive, Share, Tune, general_documents, general_text, replay_share, replay_weight


class Preference(Tune):
    """Train a model directly on preferences (DPO and its family) or ratings (KTO)."""

    model: str = artifact("Model to train, usually a fine-tuned one; it is the reference too.", kind="model")
    data: str = artifact("Preferences, or ratings for kto.", kind="records")
    method: str = setting(
        "dpo", "Objective: dpo, ipo, hinge, robust, orpo, simpo, cpo, … learn from preferences; kto from ratings."
    )
    beta: Positive | None = setting(None, "Strength of the pull towards the reference; null: the method's own.")
    label_smoothing: Share | None = setting(
        None, "Share of preferences taken to be the wrong way round (0 to 1), with cdpo, robust, exo_pair."
    )
    offset: float | None = setting(None, "Share of the data's margins that the rewards must differ by, with dpo.", ge=0.0)
    gamma: float | None = setting(None, "Margin between the rewards of a pair, with simpo.", ge=0.0)
    sft: float | None = setting(None, "Weight of the loss on the chosen answers, with simpo and cpo.", ge=0.0)
    tau: Positive | None = setting(None, "Temperature that blends the two losses of discopop.")
    average: bool | None = setting(
        None, "Average log-probabilities over tokens (the authors' code) instead of summing them (the paper), with ipo."
    )
    prompts: bool | None = setting(None, "Learn prompts too, as TRL does, instead of the chosen answers alone, with orpo.")
    desirable_weight: Positive | None = setting(None, "Weight of good answers, with kto.")
    undesirable_weight: Positive | None = setting(None, "Weight of bad answers, with kto.")
    too_long: Literal["drop", "left", "right"] = setting(
        "drop", "Treatment of a pair longer than max_length: drop it, or cut its left or right end. Always counted."
    )
    epochs: Positive = setting(1.0, "Number of passes over the data, where steps are derived.")
    reference: str | None = artifact("Reference model; the start where left out.", kind="model", default=None)
    general: str | None = general_text()
    replay_share: float = replay_share()
    replay_weight: Positive = replay_weight()
    max_documents: int = general_documents()
    seed: int = setting(0, "Seed for data order.")


class Reward(Tune):
    """Train a reward model from preferences, ratings, or verdicts on steps."""

    model: str = artifact("Language model to start from, or a reward model to continue with.", kind="model")
    data: str = artifact("Preferences or ratings.", kind="records")
    method: Literal["reward", "rating", "process"] | None = setting(
        None,
        "Objective. reward: from preferences; rating: from scores by aspect; process: from scores of steps; null: "
        "chosen by the data.",
    )
    centring: float | None = setting(
        None, "Weight of the penalty that keeps the mean reward of a pair at 0, with method=reward.", ge=0.0
    )
    aspects: Names = setting([], "Aspects to learn, one score each, with method=rating; all aspects of the data where left out.")
    loss: Literal["mse", "huber"] | None = setting(
        None, "Loss of method=rating: squared error, or Huber, which is linear beyond `delta`."
    )
    delta: Positive | None = setting(None, "Error from which the Huber loss is linear, with loss=huber.")
    too_long: Literal["drop", "left", "right"] = setting(
        "drop", "Treatment of a text longer than max_length: drop it, or cut its left or right end. Always counted."
    )
    epochs: Positive = setting(1.0, "Number of passes over the data, where steps are derived.")
    seed: int = setting(0, "Seed for the new head and data order.")


class Rl(Tune):
    """Train a model on its own answers by their rewards: GRPO and its family, PPO."""

    model: str = artifact("Model to train, usually a fine-tuned one.", kind="model")
    data: str = artifact("Prompts, or conversations whose last question is asked.", kind="records")
    rewards: Rewards = setting(
        ...,
        "Reward of an answer: a kind and its weight, {exact: 1}; or a name and settings, {right: {kind: maths, weight: 1}}.",
    )
    method: str = setting("grpo", "Policy-gradient method: reinforce, rloo, grpo, dr_grpo, dapo, gspo, cispo or ppo.")
    samples: Count = setting(8, "Number of answers to each prompt.")
    max_tokens: Count = setting(64, "Longest answer in tokens.")
    temperature: Positive = setting(1.0, "Sampling temperature; the loss uses the same distribution.")
    epochs: Positive = setting(1.0, "Number of passes over the prompts, where steps are derived.")
    updates: Count = setting(1, "Number of times that each answer is trained on.")
    minibatches: Count = setting(1, "Number of optimizer steps in one pass over a batch of answers.")
    zero_variance: Literal["keep", "skip", "resample"] = setting(
        "keep",
        "Treatment of groups whose answers all have the same reward: keep them, skip them, or resample other "
        "prompts. Always counted.",
    )
    truncated: Literal["keep", "mask", "penalise"] = setting(
        "keep",
        "Treatment of answers cut at max_tokens: keep them, mask them out of the loss, or lower their reward by "
        "`penalty`. Always counted.",
    )
    penalty: float = setting(1.0, "Amount that truncated=penalise takes off a reward.", ge=0.0)
    kl: float = setting(0.0, "Weight of the KL divergence from the reference; 0: no reference is kept.", ge=0.0)
    kl_in: Literal["loss", "reward"] = setting("loss", "Place of the KL term: in the loss, or taken off rewards.")
    kl_estimator: Literal["k1", "k2", "k3"] | None = setting(
        None, "Estimator of the KL divergence; null: k3 in the loss, k1 in rewards."
    )
    clip_low: Positive | None = setting(
        None, "Distance below 1 at which the probability ratio is clipped; null: the method's own."
    )
    clip_high: Positive | None = setting(
        None, "Distance above 1 at which the probability ratio is clipped; null: the method's own."
    )
    delta: Positive | None = setting(
        None, "Largest probability ratio where the advantage is negative (dual clip); null: no limit."
    )
    value_clip: Positive | None = setting(
        None, "Distance from the old value at which a new value is clipped, with ppo; null: 0.2."
    )
    entropy: float = setting(0.0, "Weight of the entropy bonus.", ge=0.0)
    old: Literal["derived", "engine", "trainer"] = setting(
        "derived", "Source of the old log-probabilities in the ratio; derived: the engine's, except at temperatures other than 1."
    )
    correction: Literal["none", "truncate", "mask"] = setting(
        "none",
        "Importance-sampling correction between engine and trainer, with old=trainer: truncate ratios at the cap, "
        "or mask those above it.",
    )
    correction_level: Literal["token", "sequence"] = setting(
        "token", "Unit of the correction's ratio: each token, or the whole answer."
    )
    correction_cap: Positive = setting(2.0, "Largest ratio of trainer to engine probability.")
    reference: str | None = artifact("Reference model; the start where left out.", kind="model", default=None)
    value: str | None = artifact(
        "Reward model that the value function starts from, with ppo; the start with a new head where left out.",
        kind="model",
        default=None,
    )
    reward_model: str | None = artifact(
        "Reward model that scores answers for a reward of kind `model`.", kind="model", default=None
    )
    gamma: Share = setting(1.0, "Discount per token (0 to 1), with ppo.")
    lam: Share = setting(0.95, "Lambda of generalised advantage estimation (0 to 1), with ppo.")
    value_weight: Positive = setting(0.5, "Weight of the value loss, with ppo.")
    tools: Names = setting([], "Tools that answers may call: calculator, python (in the sandbox).")
    environment: str | None = setting(None, "Environment class by import path, such as my_game:Game, that the model talks with.")
    environment_seconds: Positive = setting(
        30.0,
        "Time limit in seconds for one step of an episode (its start, a reply, its score); exceeding it stops the run.",
        identity=False,
    )
    max_rounds: Count = setting(4, "Largest number of answers in one episode, with tools or an environment.")
    probes: int = setting(
        200, "Number of held-out prompts answered greedily before, during and after training; 0: none.", ge=0, identity=False
    )
    general: str | None = general_text()
    replay_share: float = replay_share()
    replay_weight: Positive = replay_weight()
    max_documents: int = general_documents()
    seed: int = setting(0, "Seed for the order of prompts and for sampling.")
