"""Methods: one file each, named as its paper names it. Signals in, named scores out."""

from assay.methods.ask_llm import AskLLM
from assay.methods.astra import ASTRA
from assay.methods.base import Column, Method, Need, Views
from assay.methods.bm25 import BM25
from assay.methods.clip_powered import sample_diversity, semantic_alignment
from assay.methods.density import Density
from assay.methods.dsdm import DsDm
from assay.methods.dsir import DSIR
from assay.methods.dynamics import Dynamics
from assay.methods.ekfac import EKFAC
from assay.methods.ekfac_cg import EKFACCG
from assay.methods.embedding_similarity import EmbeddingSimilarity
from assay.methods.ensemble import Ensemble, ensemble_scores
from assay.methods.grad_mimic import GradMimic
from assay.methods.gradient_cosine import GradientCosine
from assay.methods.grand import GraNd
from assay.methods.ifd import IFD
from assay.methods.in_run import InRunInfluence
from assay.methods.influence import Influence, Kernel
from assay.methods.influence_distillation import InfluenceDistillation
from assay.methods.knn_shapley import knn_shapley
from assay.methods.label_quality import label_quality, model_weights
from assay.methods.less import LESS
from assay.methods.leverage import Leverage
from assay.methods.logra import LoGra
from assay.methods.minhash import MinHash
from assay.methods.ngram_classifier import NGramClassifier
from assay.methods.ood_filter import OODFilter
from assay.methods.rds_plus import RDSPlus
from assay.methods.scorer import Scorer
from assay.methods.source import SOURCE
from assay.methods.tracin import TracIn
from assay.methods.trackstar import TrackStar
from assay.methods.trak import TRAK
from assay.methods.triage import TRIAGE
from assay.probe import AdamState

__all__ = [
    "ASTRA",
    "BM25",
    "DSIR",
    "EKFAC",
    "EKFACCG",
    "IFD",
    "LESS",
    "SOURCE",
    "TRAK",
    "TRIAGE",
    "AdamState",
    "AskLLM",
    "Column",
    "Density",
    "DsDm",
    "Dynamics",
    "EmbeddingSimilarity",
    "Ensemble",
    "GraNd",
    "GradMimic",
    "GradientCosine",
    "InRunInfluence",
    "Influence",
    "InfluenceDistillation",
    "Kernel",
    "Leverage",
    "LoGra",
    "Method",
    "MinHash",
    "NGramClassifier",
    "Need",
    "OODFilter",
    "RDSPlus",
    "Scorer",
    "TracIn",
    "TrackStar",
    "Views",
    "ensemble_scores",
    "knn_shapley",
    "label_quality",
    "model_weights",
    "sample_diversity",
    "semantic_alignment",
]
