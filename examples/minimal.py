from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from prior_hub import PriorTrainer, PriorTrainingArguments, SwagCallback

data = [{"pixel_values": x.reshape(1, 8, 8).astype("f4"), "labels": y} for x, y in zip(*load_digits(return_X_y=True))]
source, target = [d for d in data if d["labels"] < 5], [d for d in data if d["labels"] >= 5]
model = ResNetConfig(num_channels=1, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True}

# the source task: learn to tell 0-4 apart, and a prior with it
swag = SwagCallback(rank=10, start=0.5, every_n_steps=5, variance_floor=1e-5)
args = TrainingArguments("out/source", max_steps=300, learning_rate=0.1, **sgd)
Trainer(ResNetForImageClassification(model), args, train_dataset=source, callbacks=[swag]).train()
swag.prior(objective="supervised classification", license="apache-2.0").save_pretrained("out/prior")  # or .push_to_hub(...)

# the target task: 5-9 from 50 examples, under that prior
args = PriorTrainingArguments("out/target", prior="out/prior", prior_scale=100.0, max_steps=200, learning_rate=0.02, **sgd)
trainer = PriorTrainer(ResNetForImageClassification(model), args, train_dataset=target[:50], eval_dataset=target[50:])
trainer.train()
print(trainer.prior_penalty.report(), f"test NLL {trainer.evaluate()['eval_loss']:.3f} nats", sep="\n")
