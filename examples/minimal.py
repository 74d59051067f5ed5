from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, set_seed

from prior_hub import PriorTrainer, PriorTrainingArguments, SwagCallback

set_seed(0)
images, labels = load_digits(return_X_y=True)
digits = [{"pixel_values": x.reshape(1, 8, 8).astype("float32"), "labels": y} for x, y in zip(images, labels, strict=True)]
old, new = [d for d in digits if d["labels"] < 5], [d for d in digits if d["labels"] >= 5]
config = ResNetConfig(num_channels=1, embedding_size=32, hidden_sizes=[64], depths=[1], layer_type="basic", num_labels=10)
args = PriorTrainingArguments("example_output", max_steps=200, learning_rate=0.01, lr_scheduler_type="constant", use_cpu=True)

# learn a prior: any Trainer, here on digits 0-4
swag = SwagCallback(rank=10, variance_floor=1e-6)
Trainer(ResNetForImageClassification(config), args, train_dataset=old, callbacks=[swag]).train()
swag.prior(dataset="digits 0-4", scale=1e4).save_pretrained("example_output/prior")

# use it: PriorTrainer where Trainer stood, the prior by folder or Hub name, on 50 examples of digits 5-9
trainer = PriorTrainer(ResNetForImageClassification(config), args, train_dataset=new[:50], prior="example_output/prior")
trainer.train()
print(f"{trainer.prior_penalty.report()}\ntest NLL {trainer.evaluate(new[50:])['eval_loss']:.3f} nats per image")
