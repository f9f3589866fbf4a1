"""What KG-LLaVA costs at its published dimensions (spec section 12)."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig, SwinConfig

from llavakit.proof.cost import CostReport, language_model, lora_parameters, on_meta, parameters, prefill_flops
from llavakit.systems.kg_llava.captioner import PrefixMapper
from llavakit.systems.kg_llava.medclip import TEXT, VISION, WIDTH, MedClip

VICUNA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
RANK, CAPTIONS = 128, 37_016
PROMPT, ADDED = 640, 100  # tokens without triplets, and those that seven captions of about twelve tokens add
FLOAT = 4  # bytes


def cost() -> CostReport:
    """Count everything."""
    report = CostReport("kg-llava")
    model = language_model(VICUNA_7B)
    group = "training: LoRA on Vicuna-7B"
    report.add(f"LoRA of rank {RANK}", lora_parameters(model, RANK), "parameters", group=group)
    group = f"store of {CAPTIONS:,} captions"
    report.add("vectors", CAPTIONS * WIDTH * FLOAT, "bytes", group=group)
    report.add("one query", CAPTIONS * WIDTH, "multiply-adds", group=group)
    group = "Vicuna-7B with triplets in the prompt"
    layers = model.get_decoder().layers
    linear = sum(tensor.numel() for tensor in layers.parameters() if tensor.dim() == 2)
    report.add("linear weights of the 32 layers", linear, "parameters", group=group)
    report.add(f"{ADDED} tokens in these layers", 2 * ADDED * linear, "FLOPs", group=group)
    longer, plain = (prefill_flops(model, length).total for length in (PROMPT + ADDED, PROMPT))
    report.add(f"prefill of {PROMPT} tokens", plain, "FLOPs", group=group)
    report.add(f"the same and {ADDED}", longer, "FLOPs", group=group)
    group = "captioner (Med-XPT's stand-in)"
    encoder = on_meta(lambda: MedClip(TEXT, VISION))
    report.add("MedCLIP, picture side", parameters(encoder.vision_model), "parameters", group=group)
    report.add("MedCLIP, text side", parameters(encoder.text_model), "parameters", group=group)
    gpt2 = GPT2Config()
    mapper = on_meta(lambda: PrefixMapper(vision_width=WIDTH, hidden_size=gpt2.n_embd))
    report.add("mapper", parameters(mapper), "parameters", group=group)
    report.add("GPT-2", parameters(language_model(gpt2)), "parameters", group=group)
    report.notes.append(f"Swin-Tiny's features are {SwinConfig(**VISION).hidden_size} wide.")
    return report
