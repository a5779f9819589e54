"""BLIP-VQA, T2I-CompBench's judge of attribute binding (Huang et al. 2023, section 4.1): is each thing that a prompt names in
the image? A model that answers questions is asked "a red car?" for every noun phrase; the score is the product of the
probabilities of yes.

Done as in their BLIPvqa_eval (Karine-Huang/T2I-CompBench, commit bfe6300), in float32. Three differences, all known:
- They print probabilities with 4 decimals before they multiply; here nothing is rounded (at most 5e-5 a question).
- transformers' weights hold position embeddings for 384 px, interpolated from the original's for 480 px, and are interpolated
  back here. The original needs no interpolation.
- Their parser is spaCy's en_core_web_sm of their day; ours is version 3.8.
"""
import re
from pathlib import Path

import torch
import torchvision.transforms.functional as TF

import losses

NOT_ASKED = ("top", "the side", "the left", "the right")  # noun phrases that name a place, in exactly this spelling
MOST = 8  # noun phrases of a prompt that are asked for
SIZE = 480  # pixels
MAX_TOKENS = 35
ENC, DEC = 30523, 30522  # the first id of a question and of an answer
YES, NO = 2748, 2053


def load(source, device):
    """(frozen model, its tokenizer) from a hub id or a folder of a BlipForQuestionAnswering. Raises ValueError, naming the
    flag, if that is not there, or something else, or a damaged one."""
    from transformers import BlipForQuestionAnswering
    if source.startswith((".", "/")) and not (Path(source) / "config.json").is_file():
        raise ValueError(f"--vqa {source}: no model there (no config.json)")
    return losses.load_judge("vqa", BlipForQuestionAnswering, source, device, torch.float32, tolerated=0)


def questions(prompt, nlp):
    """The questions of a prompt, at most 8: its noun phrases, each with a question mark, as the model reads them."""
    phrases = [chunk.text for chunk in nlp(prompt).noun_chunks if chunk.text not in NOT_ASKED]
    return [re.sub(r'[.!"()*#:;~]', "", f"{phrase}?".lower()).rstrip(" ") for phrase in phrases[:MOST]]


def pixels(image):
    """(3, H, W) in [0, 1] -> (3, 480, 480) as BLIP sees it. Through a PIL image of 8 bits, because they score PNG files."""
    picture = TF.to_pil_image((image.clamp(0, 1) * 255).round().byte().cpu())
    picture = TF.resize(picture, [SIZE, SIZE], TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_tensor(picture), losses.CLIP_MEAN, losses.CLIP_STD)


@torch.no_grad()
def probabilities(model, tokenizer, image, asked):
    """p(yes) / (p(yes) + p(no)) of each question about one image (3, H, W) in [0, 1]: (questions,)."""
    seen = model.vision_model(pixel_values=pixels(image)[None].to(model.device), interpolate_pos_encoding=True)
    text = tokenizer(asked, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(model.device)
    text.input_ids[:, 0] = ENC  # transformers' own processor leaves [CLS]
    question = model.text_encoder(input_ids=text.input_ids, attention_mask=text.attention_mask,
                                  encoder_hidden_states=seen.last_hidden_state.expand(len(asked), -1, -1)).last_hidden_state
    answer = model.text_decoder(input_ids=torch.full((len(asked), 1), DEC, device=model.device), use_cache=False,
                                encoder_hidden_states=question, encoder_attention_mask=text.attention_mask)
    return answer.logits[:, 0, [YES, NO]].softmax(-1)[:, 0]  # over the vocabulary it would be the same ratio


def score(model, tokenizer, image, asked):
    """The score of one image, in [0, 1]: the product of its questions' probabilities, 1 if there is none (as theirs)."""
    return probabilities(model, tokenizer, image, asked).prod().item() if asked else 1.0
