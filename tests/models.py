"""Tiny random models, one for each architecture, made on the spot."""

from __future__ import annotations

import torch
import transformers as t


VOCAB = 97
PAD, BOS, EOS = 0, 1, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}

DECODERS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, tie_word_embeddings=False)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, tie_word_embeddings=False)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=3, n_head=4, pad_token_id=PAD, eos_token_id=EOS
        )
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            dropout=0.0,
        )
    ),
}
ENCODERS = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES, num_labels=3)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=3, n_heads=4, hidden_dim=48, num_labels=3)
    ),
}
SEQ2SEQ = {
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    ),
}
IMAGE = VOCAB - 1  # the token that stands for a part of an image
VISION = {
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=8,
                patch_size=4,
            ),
            text_config=t.LlamaConfig(**GROUPED),
            image_token_index=IMAGE,
            image_seq_length=4,
        )
    ),
}
# The same sizes, by task.
CALM = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TASKS = {
    ("bert", "SEQ_CLS"): lambda: t.BertForSequenceClassification(t.BertConfig(**CALM, num_labels=3)),
    ("bert", "TOKEN_CLS"): lambda: t.BertForTokenClassification(t.BertConfig(**CALM, num_labels=3)),
    ("bert", "QUESTION_ANS"): lambda: t.BertForQuestionAnswering(t.BertConfig(**CALM)),
    ("bert", "FEATURE_EXTRACTION"): lambda: t.BertModel(t.BertConfig(**CALM)),
    ("llama", "SEQ_CLS"): lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**GROUPED, num_labels=3)),
    ("llama", "TOKEN_CLS"): lambda: t.LlamaForTokenClassification(t.LlamaConfig(**GROUPED, num_labels=3)),
    ("llama", "QUESTION_ANS"): lambda: t.LlamaForQuestionAnswering(t.LlamaConfig(**GROUPED)),
    ("llama", "FEATURE_EXTRACTION"): lambda: t.LlamaModel(t.LlamaConfig(**GROUPED)),
}


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The blocks of the main stack of a tiny decoder."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def build(name: str | tuple[str, str]) -> t.PreTrainedModel:
    """The tiny model of that name, the same at every call, in evaluation mode."""
    torch.manual_seed(0)
    model = {**DECODERS, **ENCODERS, **SEQ2SEQ, **VISION, **TASKS}[name]()
    # Larger weights than transformers' start, so that what one token changes is seen at others.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def prompts(*lengths: int, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch of random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    steps = torch.arange(width)
    bounds = torch.tensor(lengths)[:, None]
    mask = steps < bounds if side == "right" else steps >= width - bounds
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def randomize(model: torch.nn.Module, scale: float = 0.5, seed: int = 2) -> None:
    """Give the adapters of a model random weights, such that every edit changes the output plainly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_W." in name or ".reft_b." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def weight(layer: torch.nn.Module, letter: str, adapter: str = "default") -> torch.nn.Parameter:
    """The parameter reft_R, reft_W or reft_b of a ReftLayer."""
    return getattr(layer, f"reft_{letter}")[adapter]
