import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from moesaic import shard_experts
from moesaic.transformers import attach

dist.init_process_group("gloo")
world = dist.get_world_size()
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, output_router_logits=True, **sizes))
handle = shard_experts(model, mesh=init_device_mesh("cpu", (world,)))

ids = 1 + (torch.arange(64)[:, None] + 5 * torch.arange(16)) % 63
padding = torch.arange(16) >= 16 - torch.arange(64)[:, None] % 8
batch = dict(input_ids=ids, attention_mask=(~padding).long(), labels=ids.masked_fill(padding, -100))
rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(64)]

args = TrainingArguments(
    output_dir="runs/trainer", max_steps=20, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5,
    per_device_train_batch_size=2, gradient_accumulation_steps=4 // world, activation_checkpointing=True,
    logging_steps=1, save_steps=10, eval_strategy="steps", eval_steps=10, per_device_eval_batch_size=8 // world,
    report_to=[], disable_tqdm=True, use_cpu=True,
)  # fmt: skip
trainer = attach(Trainer(model, args, train_dataset=rows, eval_dataset=rows[:16]), handle)
trainer.train(resume_from_checkpoint=sys.argv[1] if sys.argv[1:] else None)
trainer.save_model("runs/trainer/model")
dist.destroy_process_group()
