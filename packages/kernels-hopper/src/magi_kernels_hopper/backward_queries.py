# SPDX-License-Identifier: Apache-2.0
"""One launch of the kernel that computes gradients of queries apart from the others."""

import ctypes

from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_hopper.backward_params import Params as KeysParams
from magi_kernels_hopper.driver import TensorMaps
from magi_kernels_hopper.forward import Geometry
from magi_kernels_hopper.forward import Params as ForwardParams
from magi_kernels_hopper.launching import Box, put_maps
from magi_kernels_hopper.results import Results, Scoring
from magi_kernels_hopper.tables import DeviceRowTables
from magi_kernels_hopper.variants import BackwardVariant


def number_of_kernel(cut: Geometry) -> int:
    """Which of ``BackwardVariant.query_kernels`` it is: tiles of one head are small, else masks hide much of them."""
    return int(cut.pack == 1)


class Params(ctypes.Structure):
    """``magi::backward::QueryParams`` of csrc/backward/queries.cuh."""

    _fields_ = (
        ("work", ForwardParams),
        ("row_terms", ctypes.c_void_p),
        ("log2_pack", ctypes.c_int),
        ("num_tiles_q", ctypes.c_int),
        ("dq_scale", ctypes.c_float),
        ("padding", ctypes.c_int * 27),
    )


class PreparedQueries:
    """All of a launch that does not change from call to call.

    Args:
        tables: the mask.
        cut: how work is cut.
        num_q: rows of the query tensor.
        of_keys: the parameters of the kernel that computes the other gradients.
        blocks: multiprocessors that may be used.
    """

    def __init__(
        self,
        tables: DeviceRowTables,
        cut: Geometry,
        num_q: int,
        of_keys: KeysParams,
        blocks: int,
    ) -> None:
        self._kernel = BackwardVariant.query_kernels[number_of_kernel(cut)]
        self.blocks = min(blocks * self._kernel.blocks, len(tables.order) * cut.num_packs)
        work = ForwardParams(
            tiles=tables.tiles.data_ptr(),
            runs=tables.runs.data_ptr(),
            pieces=tables.pieces.data_ptr(),
            order=tables.order.data_ptr(),
            results=Results(num_q=num_q, num_heads=cut.num_packs * cut.pack),
            pack=cut.pack,
            share_q=cut.share_q,
            packs_per_kv_head=cut.packs_per_kv_head,
            num_tiles=len(tables.order),
            num_tiles_q=len(tables.parts),
            num_packs=cut.num_packs,
            packs_per_section=cut.packs_per_section,
        )
        self._template = Params(work=work, log2_pack=of_keys.log2_pack, num_tiles_q=of_keys.num_tiles_q)
        self._cut = cut

    def fill(
        self,
        call: AttentionCall,
        maps: TensorMaps,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        dq: int,
        row_terms: int,
        zeros: int,
    ) -> Params:
        """The parameters of a launch.

        Args:
            call: how to score.
            maps: of tensors on the device.
            tensors: q, k, v and the gradients of outputs, which the copy engine can read.
            dq: the address of the gradients.
            row_terms: that of the terms of rows.
            zeros: that of the counters.
        """
        head_dim = tensors[0].shape[2]
        swizzle_bytes = 128 if head_dim % 64 == 0 else 64
        rows, box = (self._cut.pack, self._cut.share_q), (1, self._kernel.box_n)
        boxes: list[Box] = [((swizzle_bytes // 2, *each), swizzle_bytes) for each in (rows, box, box, rows)]
        params = Params.from_buffer_copy(self._template)
        put_maps(params, maps, tensors, boxes)
        params.work.scoring = Scoring.of(call.softmax_scale, call.softcap)
        params.dq_scale = call.softmax_scale
        params.work.results.out, params.work.counters, params.row_terms = dq, zeros, row_terms
        return params
