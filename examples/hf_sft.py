import sys, torch, torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from moesaic import shard_experts
from moesaic.transformers import attach

dist.init_process_group("gloo")
world = dist.get_world_size()
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, output_router_logits=True, **sizes))
handle = shard_experts(model, mesh=dist.init_device_mesh("cpu", (world,)))

words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 64)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
rows = [" ".join(f"w{2 + (row + 5 * i) % 62}" for i in range(12 - row % 4)) for row in range(64)]
args = SFTConfig(
    output_dir="runs/sft", max_steps=20, learning_rate=1e-2, max_grad_norm=0.5, per_device_train_batch_size=2,
    gradient_accumulation_steps=4 // world, logging_steps=1, save_steps=10, per_device_eval_batch_size=8 // world,
    bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
)  # fmt: skip
data, held_out = Dataset.from_dict({"text": rows}), Dataset.from_dict({"text": rows[::4]})
trainer = attach(SFTTrainer(model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer), handle)
trainer.train(resume_from_checkpoint=sys.argv[1] if sys.argv[1:] else None)
trainer.save_model("runs/sft/model")
dist.destroy_process_group()
