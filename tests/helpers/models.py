"""Tiny random models, one for each architecture, made on the spot."""

from __future__ import annotations

import json

import tokenizers as tk
import torch
import transformers as t


# The installed transformers' name for the cache, as an argument and in outputs.
CACHE = next(name for name in ("cache", "past_key_values") if name in t.LlamaForCausalLM.forward.__annotations__)

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
# Models with a state other than keys and values, or with a cache that drops old tokens.
CACHES = {
    "mistral, sliding window": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma2, sliding window": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**GROUPED, tie_word_embeddings=False, sliding_window=4)
    ),
    "lfm2, convolutions": lambda: t.Lfm2ForCausalLM(
        t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"], full_attn_idxs=[1])
    ),
    "falcon_h1, mamba beside attention": lambda: t.FalconH1ForCausalLM(
        t.FalconH1Config(
            **GROUPED,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_d_conv=4,
        )
    ),
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=4)
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
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    ),
}
SPEECH = {
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            decoder_start_token_id=3,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
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
# Models of the same sizes for each task type, without dropout.
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
    """The tiny model of that name in evaluation mode, with the same weights at every call."""
    torch.manual_seed(0)
    return _enlarged({**DECODERS, **ENCODERS, **CACHES, **SEQ2SEQ, **SPEECH, **VISION, **TASKS}[name]())


def _enlarged(model: t.PreTrainedModel) -> t.PreTrainedModel:
    """Draw larger weights than transformers does, so that a change of one token shows at others."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


TEXTS = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName a colour.\n\n### Response:\nBlue, I think.",
    "What is the answer? The answer is not known to me.",
    "user assistant system",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_VOCAB = 384


def tokenizer(kind: str = "byte level") -> t.PreTrainedTokenizerFast:
    """A small tokenizer that merges across words and line ends, as large ones do. `kind`: "byte level", or any other
    text for SentencePiece's form."""
    specials = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    tokens = tk.Tokenizer(tk.models.BPE())
    if kind == "byte level":
        tokens.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens.decoder = tk.decoders.ByteLevel()
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    else:
        tokens.normalizer = tk.normalizers.Replace(" ", "\u2581")
        tokens.decoder = tk.decoders.Sequence(
            [tk.decoders.Replace("\u2581", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
        )
        alphabet = []
    # 256 ids are left free for the bytes that a SentencePiece vocabulary falls back to.
    trainer = tk.trainers.BpeTrainer(
        vocab_size=CHAT_VOCAB if alphabet else CHAT_VOCAB - 256, special_tokens=specials, initial_alphabet=alphabet
    )
    tokens.train_from_iterator(TEXTS * 20, trainer)
    if not alphabet:
        trained = json.loads(tokens.to_str())["model"]
        vocab = trained["vocab"] | {f"<0x{byte:02X}>": len(trained["vocab"]) + byte for byte in range(256)}
        tokens.model = tk.models.BPE(vocab, [tuple(pair) for pair in trained["merges"]], byte_fallback=True)
        tokens.add_special_tokens(specials)
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def chat_model() -> t.PreTrainedModel:
    """A tiny Llama for the tokens of `tokenizer()`."""
    torch.manual_seed(0)
    sizes = {**GROUPED, "vocab_size": CHAT_VOCAB, "max_position_embeddings": 512}
    return _enlarged(t.LlamaForCausalLM(t.LlamaConfig(**sizes)))


def prompts(*lengths: int, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch of random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    steps = torch.arange(width)
    bounds = torch.tensor(lengths)[:, None]
    mask = steps < bounds if side == "right" else steps >= width - bounds
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def labelled(*lengths: int, prompt: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch to train on: the first `prompt` tokens of each sequence are its prompt, the rest is its answer."""
    batch = prompts(*lengths, seed=seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return {**batch, "labels": labels}


def randomize(model: torch.nn.Module, scale: float = 0.5, seed: int = 2) -> None:
    """Give the adapters of a model random W and b, so that every edit changes the output clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_W." in name or ".reft_b." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def weight(layer: torch.nn.Module, letter: str, adapter: str = "default") -> torch.nn.Parameter:
    """The parameter reft_R, reft_W or reft_b of a ReftLayer."""
    return getattr(layer, f"reft_{letter}")[adapter]
