"""Names and files of the networks that score: CLIP, BLIP and Mask2Former in their published layouts → ours."""
