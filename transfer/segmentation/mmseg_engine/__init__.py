"""The recipe of `rcmae segment` on mmsegmentation: framework=mmseg."""
