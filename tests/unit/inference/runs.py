"""A run folder as training leaves it at ZeRO stage 0, with a tiny model and the bytes tokenizer."""

from pathlib import Path

import torch

from megagpt.config import ModelConfig, RunConfig, save_config
from megagpt.config.schema import ScheduleConfig
from megagpt.data.history import BlendedDataset, BlendHistory, DatasetIdentity, Segment
from megagpt.data.manifest import TokenizerInfo
from megagpt.model import GPT, initialize_weights
from megagpt.tokenizer import load_tokenizer
from megagpt.training.checkpoint import CheckpointManifest, checkpoint_name
from megagpt.training.schedule import Schedule

CONFIG = ModelConfig(vocab_size=260, num_layers=2, hidden_size=32, num_attention_heads=2, max_seq_len=48)


def write_run(run_dir: Path, *steps: int, model: ModelConfig = CONFIG) -> GPT:
    """Make `run_dir` with a checkpoint a step, each of other weights; returns the last one's model."""
    run_dir.mkdir(parents=True)
    save_config(RunConfig(model=model, data={"train": [{"path": "data"}]}), run_dir / "config.yaml")
    tokenizer = load_tokenizer("bytes")
    info = TokenizerInfo(
        name="bytes",
        vocab_sha256=tokenizer.vocab_sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    (run_dir / "tokenizer.json").write_text(info.model_dump_json())
    identity = DatasetIdentity(documents=1, sequences=1, tokens=100, dtype="uint16", edge_hash="0")
    dataset = BlendedDataset(name="data", weight=1.0, identity=identity)
    segment = Segment(start=0, seq_len=48, tokenizer=None, datasets=[dataset])
    gpt = GPT(model)
    for step in steps:
        initialize_weights(gpt, seed=step)
        checkpoint = run_dir / "checkpoints" / checkpoint_name(step)
        (checkpoint / "deepspeed").mkdir(parents=True)
        torch.save({"module": gpt.state_dict()}, checkpoint / "deepspeed" / "mp_rank_00_model_states.pt")
        manifest = CheckpointManifest(
            step=step,
            consumed_samples=step,
            world_size=1,
            zero_stage=0,
            precision="fp32",
            global_batch_size=1,
            seed=0,
            seq_len=48,
            document_mask=False,
            no_decay=["bias", "norm"],
            consumed_tokens=48 * step,
            schedule=Schedule.build(ScheduleConfig(), 1e-3, 1000),
            data=BlendHistory(seed=0, segments=[segment]),
            model=model.model_dump(),
        )
        (checkpoint / "manifest.json").write_text(manifest.model_dump_json())
        (run_dir / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    return gpt.eval()
