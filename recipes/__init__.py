"""The trainings of the embedded models: ``python -m recipes sd --out runs/zoo`` (or clip, lm, reader).

common.py   scenes and captions to train on; the one training loop: resumable, within minutes or steps, on any device
sd.py       shapes-sd: autoencoder, text tower, UNet
clip.py     shapes-clip: two towers, blind where captions are silent
lm.py       shapes-lm: a language model that reads descriptions
reader.py   the independent reader of pictures
card.py     the model card beside trained weights

They need torch, transformers, diffusers, safetensors, accelerate, NumPy, Pillow and this repository, nothing else.
"""
