"""The published numbers of "Scaling Properties of Diffusion Models for Perceptual Tasks", for comparison with ours.

Errors and shares are in per cent, end-point errors in pixels, as in the paper's tables.
"""

MODELS = {  # Tables 1 and 2: parameters (active / total)
    "a1": "14.8M", "a2": "77.2M", "a3": "215M", "a4": "458M", "a5": "1.2B", "a6": "1.9B",
    "S/2-8E2A": "71M / 199M", "S/2-16E2A": "71M / 369M", "L/2-8E2A": "1.0B / 2.8B",
}  # fmt: skip

DEPTH_SETS = {  # protocol: title, images
    "hypersim": ("Hypersim", 7370),
    "eth3d": ("ETH3D", 454),
    "nyu_v2": ("NYUv2", 654),
    "scannet": ("ScanNet", 800),
    "diode": ("DIODE", 771),
}
DEPTH: dict[str, dict[str, tuple[float, float]]] = {  # Table 3: AbsRel, delta1
    "Omnidata": {"eth3d": (16.6, 77.8), "nyu_v2": (7.4, 94.5), "scannet": (7.5, 93.6), "diode": (33.9, 74.2)},
    "HDN": {"eth3d": (12.1, 83.3), "nyu_v2": (6.9, 94.8), "scannet": (8.0, 93.9), "diode": (24.6, 78.0)},
    "DPT": {"eth3d": (7.8, 94.6), "nyu_v2": (9.8, 90.3), "scannet": (8.2, 93.4), "diode": (18.2, 75.8)},
    "Marigold": {
        "hypersim": (13.5, 87.5),
        "eth3d": (6.5, 96.0),
        "nyu_v2": (5.5, 96.4),
        "scannet": (6.4, 95.1),
        "diode": (30.8, 77.3),
    },
    "the paper": {
        "hypersim": (13.6, 87.6),
        "eth3d": (4.8, 97.8),
        "nyu_v2": (6.8, 95.0),
        "scannet": (7.7, 93.7),
        "diode": (31.0, 77.2),
    },
}

FLOW_SETS = {"flying_chairs": ("FlyingChairs", 640)}
FLOW: dict[str, dict[str, tuple[float]]] = {  # Table 4: end-point error
    "DeepFlow": {"flying_chairs": (3.53,)},
    "FlowNetS": {"flying_chairs": (2.71,)},
    "FlowNetC": {"flying_chairs": (2.19,)},
    "the paper, one sample": {"flying_chairs": (3.45,)},
    "the paper, ensembled": {"flying_chairs": (3.08,)},
}

AMODAL_SETS = {"coco_a": ("COCO-A", 0), "pix2gestalt": ("P2G", 0), "mp3d_amodal": ("MP3D", 0)}  # 0: not published
AMODAL: dict[str, dict[str, tuple[float]]] = {  # Table 5: mean IoU
    "PCNet-Sup": {"coco_a": (82.53,)},
    "SAM": {"coco_a": (67.21,)},
    "SD-XL Inpainting": {"coco_a": (76.52,)},
    "pix2gestalt": {"coco_a": (82.9,), "pix2gestalt": (88.7,), "mp3d_amodal": (61.5,)},
    "the paper": {"coco_a": (82.9,), "pix2gestalt": (88.6,), "mp3d_amodal": (63.9,)},
}

LAWS: dict[str, tuple[float, float]] = {  # Figures 2 and 8: y = a C^b, C in MACs (digits of Figure 8 read from a scan)
    "pre-training loss": (0.23, -0.0098),
    "delta1 error over sampler steps": (34.24, -0.151),
    "AbsRel over sampler steps": (28.93, -0.3004),
    "delta1 error over ensemble sizes": (17.08, -0.1345),
    "AbsRel over ensemble sizes": (14.38, -0.1308),
}
