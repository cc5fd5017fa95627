"""The torch peers: generate of transformers and GRPOTrainer of TRL, in an environment of their own.

python -m launch.peers.hugging_face --workload=FILE --model=DIR --work=DIR, or --make=DIR for the weights that all use
"""

# pyright: reportMissingImports=false
import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from launch.peers import workloads
from launch.peers.protocol import Channel, Pace, serve
from launch.peers.workloads import CLIP_NORM, END, LEARNING_RATE, PAD, SHAPE, Workload


def make(folder: Path) -> None:
    """Random weights, as transformers begins them; its biases, which begin as zeros, are random too, so that
    whoever leaves them out is found."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, pad_token_id=PAD, eos_token_id=END, bos_token_id=None))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def logits(model: Any, tokens: list[int]) -> list[list[float]]:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].tolist()


def generating(model: Any, tokenizer: Any, workload: Workload):
    """A function from a seed to the number of tokens sampled."""

    def work(seed: int) -> int:
        torch.manual_seed(seed % 2**31)
        prompts = workloads.prompts(workload, seed, model.config.vocab_size)
        encoded = tokenizer([p for p in prompts for _ in range(workload.group)], return_tensors="pt", padding=True)
        encoded.pop("token_type_ids", None)
        with torch.inference_mode():
            out = model.generate(
                **encoded, max_new_tokens=workload.new_tokens, min_new_tokens=workload.new_tokens, do_sample=True,
                temperature=1.0, top_p=1.0, top_k=0,
            )  # fmt: skip
        new = out[:, encoded["input_ids"].shape[1] :]
        tokenizer.batch_decode(new)
        return new.numel()

    return work


class PacedCallback(TrainerCallback):
    """After every optimizer step waits until the next is asked for."""

    def __init__(self, pace: Pace):
        self._pace = pace
        self.tokens = 0  # sampled in this step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = not self._pace.step_ended(self.tokens)
        return control


def train(model: Any, tokenizer: Any, workload: Workload, work: Path, pace: Pace, steps: int) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    questions = [p for step in workloads.endless_prompts(workload, model.config.vocab_size, steps) for p in step]
    settings = GRPOConfig(
        output_dir=str(work / "trl"), per_device_train_batch_size=workload.samples, num_generations=workload.group,
        max_completion_length=workload.new_tokens, max_steps=steps, learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP_NORM, lr_scheduler_type="constant", beta=0.0, temperature=1.0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", loss_type="grpo", num_iterations=1,
        generation_kwargs={"min_new_tokens": workload.new_tokens}, shuffle_dataset=False, disable_tqdm=True,
    )  # fmt: skip

    paced = PacedCallback(pace)

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        paced.tokens = sum(map(len, completion_ids))
        return [workloads.reward(text) for text in completions]

    GRPOTrainer(
        model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=tokenizer, callbacks=[paced],
    ).train()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path)
    for name in ("workload", "model", "work"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    if given.make is not None:
        make(given.make)
        return
    channel, workload = Channel(), workloads.load(given.workload)
    model = Qwen2ForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model, padding_side="left")
    names = ("torch", "transformers", "trl", "accelerate")
    about = {
        "versions": {name: version(name) for name in names},
        "logits": logits(model, tokenizer.encode(workloads.prompts(workload, 0, model.config.vocab_size)[0])),
    }
    if workload.kind == "generate":
        serve(channel, generating(model, tokenizer, workload), given.warm_up, **about)
    else:
        pace = Pace(channel, given.warm_up, **about)
        train(model, tokenizer, workload, given.work, pace, given.steps)


if __name__ == "__main__":
    main()
