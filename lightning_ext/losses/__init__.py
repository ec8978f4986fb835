"""Losses as modules, over the samples of all data-parallel ranks."""

from lightning_ext.losses._clip import CLIPLoss
from lightning_ext.losses._info_nce import InfoNCELoss
from lightning_ext.losses._nt_xent import NTXentLoss
from lightning_ext.losses._siglip import SigLIPLoss

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXentLoss", "SigLIPLoss"]
