"""Testing for real: from any folder, two jobs at once, and checkpoints that do not fit."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scripts import ROOT, call, errors_in

from tools.draw_predictions import is_right, read_log


def test_best_checkpoint_tested_twice_at_once(trained, tiny):
    def test(number: int) -> str:
        command = (ROOT / 'tools/dist_test.sh', 'tiny.py', 'whole/best.pth', 2)
        where = ('--work-dir', f'test{number}', '--out', f'test{number}.pkl')
        return call(*command, *where, cwd=tiny).output

    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(test, range(2)))
    _, accuracies = read_log(trained.work_dir)
    for number, output in enumerate(outputs):
        reported = float(re.search(r'accuracy/top1: ([\d.]+)', output)[1])
        assert reported == pytest.approx(max(accuracies.values()), abs=1e-3)
        predictions = pickle.loads((tiny / f'test{number}.pkl').read_bytes())
        assert len({p['img_path'] for p in predictions}) == len(predictions) == 40
        assert reported == pytest.approx(100 * sum(map(is_right, predictions)) / 40, abs=1e-3)
        assert 'weights_only' not in output


def test_other_folder_and_environment_of_slurm(trained, tiny, tmp_path):
    srun = tmp_path / 'bin/srun'
    srun.parent.mkdir()
    srun.write_text(
        '#!/usr/bin/env bash\necho "$@" > srun.txt\nwhile [ "${1#--}" != "$1" ]; do shift; done\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!\n'
    )
    srun.chmod(0o755)
    (tmp_path / 'data').symlink_to(tiny / 'data')
    said = call(
        'bash',
        '-c',
        f'PATH={srun.parent}:$PATH {ROOT}/tools/slurm_test.sh debug job {tiny}/tiny.py {tiny}/whole/best.pth',
        cwd=tmp_path,
        GPUS=2,
        SLURM_NTASKS=2,
        SLURM_JOB_ID=5,
        MASTER_ADDR='127.0.0.1',
        SRUN_ARGS='--quiet',
    )
    accuracy = max(read_log(trained.work_dir)[1].values())
    assert f'accuracy/top1: {accuracy:.4f}' in said.output
    asked = (tmp_path / 'srun.txt').read_text()
    for option in (
        '--partition=debug',
        '--job-name=job',
        '--gres=gpu:2',
        '--ntasks=2',
        '--ntasks-per-node=2',
        '--quiet',
    ):
        assert option in asked.split()


def test_slurm_train_passes_its_arguments(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    command = f'PATH={tmp_path}:$PATH {ROOT}/tools/slurm_train.sh debug job config.py --work-dir "a b"'
    said = call('bash', '-c', command, cwd=tmp_path, GPUS=16)
    assert '--ntasks=16 --ntasks-per-node=8' in said.stdout
    assert said.stdout.strip().endswith(f'{ROOT}/tools/train.py config.py --work-dir a b --launcher slurm')


def test_checkpoint_of_another_model(trained, tiny, tmp_path):
    checkpoint = torch.load(trained.work_dir / 'best.pth', weights_only=False)
    state = checkpoint['state_dict']
    state['backbone.extra'] = state.pop('backbone.pos_embed')
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'other.pth')
    said = call('python', ROOT / 'tools/test.py', 'tiny.py', tmp_path / 'other.pth', cwd=tiny, expect=2)
    assert 'backbone.extra' in said.stderr and 'backbone.pos_embed' in said.stderr
    assert 'Traceback' not in said.output


def test_truncated_checkpoint(trained, tiny, tmp_path):
    whole = (trained.work_dir / 'best.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    said = call('python', ROOT / 'tools/test.py', 'tiny.py', tmp_path / 'cut.pth', cwd=tiny, expect=2)
    assert f'test.py: error: checkpoint {tmp_path}/cut.pth: ' in errors_in(said.stderr)[0]
    assert 'Traceback' not in said.output
