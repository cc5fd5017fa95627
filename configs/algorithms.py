"""Every algorithm on a short form of the multi-hop world, each a few lines: what differs from GRPO's settings.

python -m launch.train --config=configs/algorithms.py:gspo --workdir=runs/gspo
python -m launch.study --config=configs/algorithms.py
"""

from collections.abc import Callable

from configs.search_grpo import demo
from rlrag.config import Experiment, Stage
from rlrag.study import CONTINUED, Arm, Primary, Study

STEPS = 60


def start() -> Experiment:
    """GRPO (Shao et al. 2024) on a short form of the demo; the others change this."""
    experiment = demo()
    experiment.steps = STEPS
    experiment.retriever.spawn = False  # a server for each of many short runs would cost more than it shows
    experiment.main.evaluate_every = 10
    experiment.checkpoint_every = STEPS
    return experiment


def grpo(main: Stage, experiment: Experiment) -> None:
    """Sequences count alike, as in the paper; its KL term is off here and on in grpo_kl_*."""
    main.loss.aggregate = "sequence"


def dr_grpo(main: Stage, experiment: Experiment) -> None:
    """Liu et al. 2025: no division by the standard deviation, none by the length."""
    main.credit.divide = False
    main.loss.aggregate = "constant"


def dapo(main: Stage, experiment: Experiment) -> None:
    """Yu et al. 2025: clip-higher, dynamic sampling, token-level mean, overlong shaping."""
    main.loss.clip_high = 0.28
    main.dynamic_sampling = 3
    main.update.minibatches = 2
    experiment.reward.overlong = 1.0


def gspo(main: Stage, experiment: Experiment) -> None:
    """Zheng et al. 2025: the ratio is the sequence's, with their narrow bounds; two updates a batch, or nothing would
    be clipped."""
    main.loss.ratio = main.loss.aggregate = "sequence"
    main.loss.clip_low, main.loss.clip_high = 3e-4, 4e-4
    main.update.minibatches = 2


def rloo(main: Stage, experiment: Experiment) -> None:
    """Ahmadian et al. 2024: leave-one-out baseline, the sequence as one action, KL within the reward."""
    main.credit.kind = "leave_one_out"
    main.credit.kl_reward, main.loss.kl_estimator = 1e-3, "k1"
    main.loss.aggregate = "constant"


def reinforce_plus_plus(main: Stage, experiment: Experiment) -> None:
    """Hu 2025: no critic, no groups needed, KL within the reward, advantages whitened over the batch."""
    main.credit.kind = "returns"
    main.credit.kl_reward, main.loss.kl_estimator = 1e-3, "k1"


def reinforce_plus_plus_baseline(main: Stage, experiment: Experiment) -> None:
    """Its variant for groups: the group's mean is the baseline, KL (k2) a loss."""
    main.credit.kind, main.credit.baseline = "returns", True
    main.loss.kl, main.loss.kl_estimator = 1e-3, "k2"


def ppo(main: Stage, experiment: Experiment) -> None:
    """Schulman et al. 2017 with a critic of its own, a copy of the policy at the start."""
    main.credit.kind = "gae"
    main.loss.critic = "separate"
    main.critic.learning_rate = 1e-3
    main.update.minibatches = 2


def ppo_trunk(main: Stage, experiment: Experiment) -> None:
    """PPO with the critic's head on the policy's trunk."""
    main.credit.kind = "gae"
    main.loss.critic, main.loss.value = "trunk", 0.1
    main.update.minibatches = 2


def rejection(main: Stage, experiment: Experiment) -> None:
    """Learn from correct episodes alone."""
    main.credit.kind = "rejection"


def grpo_kl_fixed(main: Stage, experiment: Experiment) -> None:
    grpo(main, experiment)
    main.loss.kl = 1e-2


def grpo_kl_adaptive(main: Stage, experiment: Experiment) -> None:
    grpo(main, experiment)
    main.loss.kl, main.loss.kl_target, main.loss.kl_horizon = 1e-2, 0.05, 2000


def grpo_entropy(main: Stage, experiment: Experiment) -> None:
    grpo(main, experiment)
    main.loss.entropy = 1e-3


def grpo_dual_clip(main: Stage, experiment: Experiment) -> None:
    """Several epochs and minibatches a batch, with the bound of Ye et al. 2020 on what they can do."""
    main.loss.dual_clip = 3.0
    main.update.epochs, main.update.minibatches = 2, 2


def grpo_importance_token(main: Stage, experiment: Experiment) -> None:
    """Truncated weights between the sampler's log-probs and the learner's own."""
    main.loss.old_logp, main.loss.importance = "recompute", "token"


def grpo_importance_sequence(main: Stage, experiment: Experiment) -> None:
    main.loss.old_logp, main.loss.importance = "recompute", "sequence"


def grpo_one_step_off(main: Stage, experiment: Experiment) -> None:
    """The next batch is played while this one is learned from; every ratio is to the policy that played."""
    grpo(main, experiment)
    main.one_step_off = True


ALGORITHMS: dict[str, Callable[[Stage, Experiment], None]] = {
    change.__name__: change
    for change in (
        grpo, dr_grpo, dapo, gspo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, ppo, ppo_trunk, rejection,
        grpo_kl_fixed, grpo_kl_adaptive, grpo_entropy, grpo_dual_clip, grpo_importance_token, grpo_importance_sequence,
        grpo_one_step_off,
    )
}  # fmt: skip


VARIANTS = ("warm_start", CONTINUED, *ALGORITHMS)


def get_config(variant: str = "grpo") -> Experiment:
    """An algorithm by name; warm_start: the policy they all begin with; warm_start_continued: the same supervised
    learning for as many updates on as many episodes as GRPO's."""
    experiment = start()
    if variant == "warm_start":
        experiment.steps = 0
    elif variant == CONTINUED:
        experiment.recipe = "rlrag.recipes.search_grpo:build_supervised"
        # 32 questions x 8 episodes a step; at the learning rate the warm-up ended with.
        experiment.main.questions, experiment.main.group_size = 256, 1
        experiment.main.update.learning_rate, experiment.main.update.weight_decay = 4e-4, 0.01
        experiment.main.update.warm_up_steps = 0
    elif variant in ALGORITHMS:
        ALGORITHMS[variant](experiment.main, experiment)
    else:
        raise ValueError(f"configs/algorithms.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment.name = f"algorithms:{variant}"
    return experiment


FIVE = ("grpo", "ppo", "gspo")  # algorithms with five seeds, and also five times longer


def get_study() -> Study:
    """Does every algorithm beat its warm start continued by supervised learning for equal updates and episodes?"""
    arms = {CONTINUED: Arm(CONTINUED, seeds=(0, 1, 2, 3, 4))}
    for name in ALGORITHMS:
        arms[name] = Arm(name, seeds=(0, 1, 2, 3, 4) if name in (*FIVE, "grpo_one_step_off") else (0, 1, 2))
    for name in FIVE:
        arms[f"{name}_5x"] = Arm(name, seeds=(0, 1, 2, 3, 4), fields={"steps": 5 * STEPS})
    return Study(
        name="algorithms",
        title="Every algorithm on a short form of the multi-hop world",
        arms=arms,
        primary=Primary(metric="em", better="grpo", baseline=CONTINUED, threshold=0.2),
        contrasts=(
            *((name, CONTINUED) for name in ALGORITHMS if name != "grpo"),
            *((name, "grpo") for name in ALGORITHMS if name != "grpo"),
            *((f"{name}_5x", name) for name in FIVE),
        ),
    )
