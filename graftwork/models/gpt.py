"""GPT: a decoder-only megatron-core model as a LightningModule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from graftwork import parallel
from graftwork.core.gpt import build_gpt
from graftwork.errors import ConfigError, suggest
from graftwork.models.batch import RightPadded, context_slice, flatten_packed
from graftwork.models.fitting import Fitting
from graftwork.models.generation.logits import all_logits
from graftwork.models.loss import answer_rows, token_losses
from graftwork.models.precision import common_dtype
from graftwork.models.shapes import Shape
from graftwork.models.tokenizer import load_tokenizer
from graftwork.models.weights import export_weights, fingerprint, load_weights
from graftwork.models.weights.drawn import draw
from graftwork.models.weights.hub import resolve
from graftwork.peft.artifact import directory as artifact
from graftwork.peft.host import Host

RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


class GPT(Fitting):
    """A GPT-style model (GPT-2/3, LLaMA, Nemotron, SmolLM2, ...) over megatron-core's GPTModel.

    Args:
        shape: Its sizes.
        checkpoint: Base weights: a Hugging Face directory, a GGUF file or a known name; None starts at random.
        dtype: ``fp32``, ``bf16`` (bf16 base, fp32 adapters), ``auto`` (what the machine does fast) or None (the
            checkpoint's own).
        recompute: Activation recomputation: ``full``, ``selective`` or None.
        seed: Seed of random base weights and of every adapter's initial values.
    """

    def __init__(
        self,
        shape: Shape,
        checkpoint: Optional[str] = None,
        dtype: Optional[str] = None,
        recompute: Optional[str] = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if recompute is not None and recompute not in RECOMPUTE:
            raise ConfigError(f"recompute is {recompute!r}; {suggest(str(recompute), RECOMPUTE)}")
        self.shape, self.checkpoint, self.dtype_name = shape, checkpoint, dtype
        self.recompute, self.seed = recompute, seed
        self.module: nn.Module | None = None
        self._tokenizer: Any = None
        self._answer_rows: Tensor | None = None

    # ---- building ------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's megatron-core modules: one, or several under virtual pipelining."""
        if self.module is None:
            return []
        return list(self.module) if isinstance(self.module, nn.ModuleList) else [self.module]

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig."""
        return self.chunks[0].config

    @property
    def checkpoint_dir(self) -> Path | None:
        """Directory of the base checkpoint (a GGUF file is converted once), None for random weights."""
        return None if self.checkpoint is None else resolve(self.checkpoint)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded at first use; assign one for a model with random weights."""
        if self._tokenizer is None:
            if self.checkpoint_dir is None:
                raise ConfigError("A model without checkpoint has no tokenizer: set model.tokenizer.")
            self._tokenizer = load_tokenizer(self.checkpoint_dir)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def configure_model(self) -> None:
        """Build the module, stream in the base weights, carry out queued adapter requests; idempotent."""
        if self.module is not None:
            self._carry_out_queue()  # what an earlier call could not do
            return
        parallel.ensure_initialized(self.seed)
        config = self.shape.transformer_config(**self._parallel_fields())
        parallel.seed_rng(self.seed)
        virtual = parallel.vp_size()
        chunks = [self._build_chunk(config, vp) for vp in (range(virtual) if virtual else [None])]
        if self.checkpoint_dir is not None:
            load_weights(chunks, self.shape, self.checkpoint_dir)
        else:
            draw(chunks, config, self.seed)
        self.module = nn.ModuleList(chunks) if virtual else chunks[0]
        self.module.train(self.training)
        self._carry_out_queue()

    def host(self) -> Host:
        """Describe the model to transforms."""
        return Host(self.chunks, self.config, self.shape.vocab_size, self.seed)

    def base_identity(self) -> artifact.Base:
        """Family, shape and fingerprint of the base, free of any parallel layout."""
        directory = self.checkpoint_dir
        name = self.checkpoint if self.checkpoint and not Path(self.checkpoint).exists() else None
        return artifact.Base(
            name=name or (directory.name if directory else "random weights"),
            family=self.shape.family,
            shape=dict(sorted(vars(self.shape).items())),
            fingerprint=fingerprint(directory) if directory else f"random:{self.seed}",
        )

    def _parallel_fields(self) -> dict[str, Any]:
        dtype = common_dtype(self.dtype_name, self.checkpoint_dir)
        return {
            **parallel.current_layout().transformer_fields(),
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "perform_initialization": self.checkpoint is None,  # else every value comes from the checkpoint
            **(RECOMPUTE[self.recompute] if self.recompute else {}),
        }

    def _build_chunk(self, config: Any, vp: int | None) -> nn.Module:
        first, last = parallel.is_first_stage(vp), parallel.is_last_stage(vp)
        arguments = self.shape.gpt_arguments(parallel.tp_size())
        chunk = build_gpt(config, pre_process=first, post_process=last, vp_stage=vp, **arguments)
        if first:
            chunk.embedding.register_forward_hook(_start_gradients)
        if last:
            chunk.decoder.register_forward_hook(self._keep_answer_rows)
        return chunk

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits [b, s, vocab_size] of token ids [b, s] (virtual ids included).

        ``attention_mask`` [b, s] is 1 on tokens, 0 on padding on either side, as in transformers; positions count from
        the first token. Logits at padding are zero.
        """
        self.configure_model()
        rows = RightPadded.of(input_ids, attention_mask)
        return rows.restore(all_logits(self, rows.tokens))

    def run_chunk(self, chunk: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Call one megatron-core chunk on a microbatch: logits [b, s, v/tp], or hidden states before the last stage."""
        packed = batch.get("cu_seqlens")
        return chunk(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            packed_seq_params=None if packed is None else packed_parameters(packed),
        )

    def forward_step(self, data_iterator: Iterator[dict[str, Any]], module: nn.Module) -> tuple[Tensor, Any]:
        """megatron-core's ``forward_step_func``: one microbatch's output and the function that reads its loss.

        The function returns (sum of the answer tokens' losses, their number, {"loss_sum", "num_tokens"}), so that
        whoever drives the schedule divides once, by the tokens of the whole global batch.
        """
        batch = prepare(next(data_iterator))
        labels = batch["labels"]
        rows = answer_rows(labels)
        scattered = self.config.sequence_parallel
        self._answer_rows = None if scattered else rows
        try:
            output = self.run_chunk(module, batch)
        finally:
            self._answer_rows = None

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logits = output.reshape(-1, output.shape[-1])
            losses = token_losses(
                logits[rows] if scattered else logits, labels.reshape(-1)[rows], self.shape.vocab_size
            )
            total, count = losses.sum(), torch.tensor(len(rows), dtype=torch.int, device=output.device)
            return total, count, {"loss_sum": total.detach().clone(), "num_tokens": count.clone()}

        return output, loss_func

    def _keep_answer_rows(self, decoder: nn.Module, arguments: Any, hidden: Tensor) -> Tensor | None:
        """Hand only positions with a target to the output layer: [s, b, h] -> [n, 1, h]; the rest has no loss."""
        if self._answer_rows is None:
            return None
        return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[self._answer_rows].unsqueeze(1)

    # ---- results -------------------------------------------------------------------------------------------------

    def export_hf(self, path: str | Path) -> Path:
        """Write the base weights (merged adapters included) as a Hugging Face directory, from every rank together."""
        export_weights(self.chunks, self.shape, path, source=self.checkpoint_dir)
        return Path(path)


def prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """Bring a microbatch into megatron-core's form: packed rows in one line, this context-parallel rank's slice."""
    if batch.get("packed"):
        return flatten_packed(batch)
    return context_slice(batch)


def packed_parameters(cu_seqlens: Tensor) -> PackedSeqParams:
    """Return megatron-core's description of packed rows with boundaries ``cu_seqlens`` int32 [n + 1]."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _start_gradients(embedding: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """Let gradients start at the embedding's output even when the embedding is frozen.

    Recomputation runs each layer inside an autograd function whose output needs gradients only if an *input* does;
    without this, full recomputation over a frozen embedding gives adapters no gradient at all.
    """
    wanted = embedding.training and torch.is_grad_enabled() and not output.requires_grad
    return output.requires_grad_(True) if wanted else output
