"""Queries with boxes: proposals, refinement, weight maps in units of boxes, noisy objects, and the
dense head."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_convert, box_iou

from helpers import (
    IMAGE_SIZES,
    assert_close,
    make_image,
    make_scales,
    make_smca,
    random_targets,
    randomize,
    write_smca_config,
)
from smca.analysis import detect_and_record
from smca.inference import Predictor
from smca.modeling import Denoising, DenseHead, ProposedQueries
from smca.modeling.cell_head import IMPOSSIBLE, Cells, change_boxes
from smca.modeling.decoder import Decoder
from smca.modeling.kernels import fit_channels
from smca.modeling.queries import Queries
from smca.modeling.weight_map import MAPS, Modulation, WeightMapPredictor

D, H, C, Q = 32, 4, 5, 7
PIXELS = torch.tensor([[w, h] for h, w in IMAGE_SIZES], dtype=torch.float32)


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(*shape, 4, generator=generator)


# Proposals


def best_cells(scores, valid, scales):
    """Cells that score highest of their 3 x 3 neighbors, by their scores, then the others from the
    lowest on."""
    peaks, others, first = [], [], 0
    for height, width in (scale.size for scale in scales):
        grid = scores[first : first + height * width].view(height, width)
        for y in range(height):
            for x in range(width):
                index = first + y * width + x
                around = grid[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                kind = peaks if grid[y, x] == around.max() else others
                if valid[index]:
                    kind.append(index)
        first += height * width
    return sorted(peaks, key=lambda i: -scores[i]) + sorted(others, key=lambda i: scores[i])


def test_queries_are_the_cells_that_score_higher_than_their_neighbors():
    module = randomize(ProposedQueries(Q, D, C)).train()
    scales = make_scales([16, 32])
    queries = module(scales, PIXELS)
    cells = module.cells(scales, PIXELS)
    boxes = module.cells.predict_boxes(cells.hidden, cells.boxes)
    assert torch.equal(queries.content[0], module.weight) and queries.position is None
    for image in range(2):
        best = best_cells(cells.logits[image].amax(-1), cells.valid[image], scales)[:Q]
        assert_close(queries.reference[image], boxes[image, best], 1e-6)
        assert_close(queries.proposals.logits[0, image], cells.logits[image, best], 1e-6)
    assert not queries.reference.requires_grad and queries.proposals.boxes_cxcywh.requires_grad
    assert module.eval()(scales, PIXELS).proposals is None


def test_cells_start_with_boxes_around_their_centers():
    (scale,) = make_scales([16])
    head = ProposedQueries(Q, D, C).cells
    cells = head([scale], PIXELS)
    # The third cell of the second row, at (40, 24) of 128 x 96 pixels, and four cells wide.
    index = scale.size[1] + 2
    expected = torch.tensor([40 / 128, 24 / 96, 64 / 128, 64 / 96])
    assert_close(cells.boxes[0, index], expected, 1e-6)
    start = head.predict_boxes(cells.hidden, cells.boxes)
    assert_close(start[0, index], expected, 1e-4)
    # Cells whose center is outside the image do not count.
    rows, columns = torch.arange(scale.size[0]), torch.arange(scale.size[1])
    inside = (16 * rows + 8 < 40)[:, None] & (16 * columns + 8 < 60)
    assert torch.equal(cells.valid[1], inside.flatten())
    assert (cells.logits[1, ~cells.valid[1]] == IMPOSSIBLE).all()


def test_heads_without_a_projection_read_the_tokens():
    scales = make_scales([16, 32])
    head = randomize(DenseHead(D, C, deep=False)).cells
    cells = head(scales, PIXELS)
    tokens = torch.cat([scale.tokens for scale in scales], 1)
    logits, change = (
        tokens @ layer.weight.T + layer.bias for layer in (head.class_embed, head.box_embed)
    )
    assert_close(cells.logits[cells.valid], logits[cells.valid], 1e-5)
    boxes = head.predict_boxes(cells.hidden, cells.boxes)
    assert_close(boxes, change_boxes(cells.boxes, change), 1e-5)
    proposals = ProposedQueries(Q, D, C, project=False)
    assert torch.equal(proposals.cells(scales, PIXELS).hidden, tokens)


def test_boxes_change_in_units_of_their_sides():
    box = torch.tensor([0.4, 0.5, 0.2, 0.1])
    assert torch.equal(change_boxes(box, torch.zeros(4)), box)
    change = torch.tensor([0.5, -1.0, 0.0, 1.0])
    assert_close(change_boxes(box, change), torch.tensor([0.5, 0.4, 0.2, 0.1 * 2.718282]), 1e-6)
    assert change_boxes(box, torch.full((4,), 1e9)).isfinite().all()


def test_an_image_may_have_fewer_cells_than_queries():
    module = randomize(ProposedQueries(30, D, C))
    queries = module(make_scales([64]), PIXELS)
    assert queries.reference.shape == (2, 30, 4) and queries.reference.isfinite().all()


# Weight maps in units of boxes


def squared_distance(shape, dx, dy, a_x=None, a_y=None, a_xy=None):
    return {
        "fixed": lambda: dx**2 + dy**2,
        "single": lambda: a_x**2 * (dx**2 + dy**2),
        "independent": lambda: (a_x * dx) ** 2 + (a_y * dy) ** 2,
        "covariance": lambda: (a_x * dx) ** 2 + (a_y * dy) ** 2 + (a_xy * dx * dy) ** 2,
    }[shape]()


@pytest.mark.parametrize("shape", MAPS)
def test_maps_are_measured_in_half_sides_of_the_box(shape):
    scales = make_scales([16, 32])
    settings = dict(embed_dim=D, num_heads=H, num_scales=2, in_boxes=True)
    predictor = randomize(WeightMapPredictor(Modulation(shape), **settings))
    queries = torch.randn(2, Q, D, generator=torch.Generator().manual_seed(1))
    boxes = random_boxes(2, Q) * 100  # cxcywh in pixels
    boxes[0, 0, 2:] = 1.0  # narrower than a cell
    maps = predictor(queries, boxes[..., :2], scales, boxes[..., 2:] / 2)
    offsets = predictor.offset(queries).view(2, Q, 2, H, 2)
    for index, (found, scale) in enumerate(zip(maps, scales)):
        half = boxes[..., 2:].div(2 * scale.stride)
        offset = offsets[:, :, index].transpose(1, 2) * half[:, None]
        centers = (boxes[..., :2] / scale.stride)[:, None] + offset - 0.5
        assert_close(found.centers, centers, 1e-5)
        unit = half.clamp(min=0.5)
        y, x = torch.meshgrid(*(torch.arange(n) for n in scale.size), indexing="ij")
        dx = (x - centers[..., 0, None, None]) / unit[:, None, :, 0, None, None]
        dy = (y - centers[..., 1, None, None]) / unit[:, None, :, 1, None, None]
        a = found.spreads[..., None, None, :].unbind(-1)
        expected = squared_distance(shape, dx, dy, *a)
        assert_close(found.log_weights(), -expected, 1e-5)
        if found.channels() is not None:
            query, cells = fit_channels(found.channels(), torch.float32, 1.0)
            near = expected.flatten(3) < 30
            difference = query @ cells.mT + expected.flatten(3)
            assert difference[near].abs().max() < 2e-3


def test_heads_start_in_all_directions_halfway_to_the_sides():
    predictor = WeightMapPredictor(embed_dim=D, num_heads=4, num_scales=1, in_boxes=True)
    center, half = torch.full((1, 1, 2), 64.0), torch.tensor([[[32.0, 16.0]]])
    scales = make_scales([8])
    (found,) = predictor(torch.zeros(1, 1, D), center, scales, half)
    expected = torch.tensor([[80.0, 64.0], [64.0, 72.0], [48.0, 64.0], [64.0, 56.0]])
    assert_close((found.centers[0, :, 0] + 0.5) * 8, expected, 1e-4)
    assert (found.spreads == 1).all()


# The decoder that refines


def make_decoder(**settings):
    sizes = dict(num_layers=3, num_scales=2, embed_dim=D, num_heads=H, ffn_dim=48, dropout=0.0)
    return randomize(Decoder(refine=True, **{**sizes, **settings}))


def change(index, hidden):
    return 0.1 * hidden[..., :4] + 0.1 * index


def random_queries(num_groups=0, group_size=0, seed=0):
    count = Q + num_groups * group_size
    content = torch.randn(2, count, D, generator=torch.Generator().manual_seed(seed))
    reference = random_boxes(2, count, seed=seed)
    return Queries(content, None, reference, None, num_groups, group_size)


@pytest.mark.parametrize("modulation", [Modulation(), Modulation(per_head=False), None])
def test_each_layer_starts_from_the_boxes_of_the_one_before(modulation):
    decoder, queries = make_decoder(modulation=modulation), random_queries()
    output = decoder(make_scales([16, 32]), queries, PIXELS, change)
    assert torch.equal(output.references[0], queries.reference)
    for index in (1, 2):
        before, by = output.references[index - 1], change(index - 1, output.hidden[index - 1])
        center = before[..., :2] + by[..., :2] * before[..., 2:]
        expected = torch.cat([center, before[..., 2:] * by[..., 2:].exp()], -1)
        assert_close(output.references[index], expected, 1e-6)
    assert not output.references.requires_grad
    output.hidden.square().sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_layers_read_the_scales_that_are_named():
    scales, queries = make_scales([8, 16, 32]), random_queries()
    decoder = make_decoder(num_scales=3, read=[1, 2])
    alone = make_decoder(num_scales=2)
    hidden = decoder(scales, queries, PIXELS, change).hidden
    assert torch.equal(hidden, alone(scales[1:], queries, PIXELS, change).hidden)
    for read in ([], [3]):
        with pytest.raises(ValueError, match=r"^read=\[.*\] must name some of the scales 0 to 2"):
            make_decoder(num_scales=3, read=read)


def test_groups_do_not_see_one_another_nor_do_queries_see_groups():
    decoder, scales = make_decoder(), make_scales([16, 32])
    queries = random_queries(num_groups=3, group_size=4)
    hidden = decoder(scales, queries, PIXELS, change).hidden
    alone = Queries(queries.content[:, :Q], None, queries.reference[:, :Q])
    assert_close(hidden[:, :, :Q], decoder(scales, alone, PIXELS, change).hidden, 1e-5)
    other = random_queries(3, 4, seed=1)
    mixed = torch.cat([queries.content[:, : Q + 4], other.content[:, Q + 4 :]], 1)
    changed = decoder(scales, queries._replace(content=mixed), PIXELS, change).hidden
    assert_close(changed[:, :, : Q + 4], hidden[:, :, : Q + 4], 1e-5)
    assert (changed - hidden)[:, :, Q + 4 :].abs().amax(-1).min() > 0


# Noisy objects


def add_noisy(denoising, targets):
    """The noisy objects alone, and their padding."""
    queries = Queries(torch.zeros(len(targets), Q, D), None, torch.zeros(len(targets), Q, 4))
    joined, padding = denoising(queries, targets)
    assert torch.equal(joined.content[:, :Q], queries.content)
    assert joined.num_groups * joined.group_size == padding.shape[1]
    return Queries(joined.content[:, Q:], None, joined.reference[:, Q:]), padding


def test_noisy_objects_are_near_their_objects_and_negatives_farther():
    torch.manual_seed(0)
    targets = random_targets([3, 0, 1], C)
    denoising = Denoising(D, C, groups=50, box_noise=0.4, label_noise=0.0)
    noisy, padding = add_noisy(denoising, targets)
    assert noisy.content.shape == (3, 50 * 2 * 3, D)
    place = torch.arange(3)
    padding = padding.view(3, 50, 2, 3)
    for image, count in enumerate((3, 0, 1)):
        assert torch.equal(padding[image, 0, 0], place >= count)
    corners = box_convert(noisy.reference, "cxcywh", "xyxy").view(3, 50, 2, 3, 4)
    for index, (label, box) in enumerate(zip(targets[0].labels, targets[0].boxes_cxcywh)):
        truth = box_convert(box, "cxcywh", "xyxy")
        moved = (corners[0, :, :, index] - truth).abs() / (box[2:] / 2).repeat(2)
        inner = (truth > 0.01) & (truth < 0.99)
        assert (moved[:, 0, inner] < 0.4 + 0.02).all()
        clipped = (corners[0, :, 1, index] < 0.01) | (corners[0, :, 1, index] > 0.99)
        assert ((moved[:, 1] > 0.4 - 0.02) | clipped).all() and moved[:, 1].max() < 0.8 + 0.02
        content = noisy.content.view(3, 50, 2, 3, D)[0, :, :, index]
        assert torch.equal(content, denoising.label_embed.weight[label].expand_as(content))


def test_noisy_labels_are_replaced_at_their_rate():
    torch.manual_seed(0)
    denoising = Denoising(D, C, groups=2000, label_noise=0.5)
    (target,) = random_targets([1], C)
    content = add_noisy(denoising, [target])[0].content[0]
    same = (content == denoising.label_embed.weight[target.labels[0]]).all(-1).float().mean()
    assert abs(same - (0.5 + 0.5 / C)) < 0.03


@pytest.mark.parametrize("num_objects", [[3, 0, 1], [0, 0]], ids=str)
def test_the_matching_of_noisy_objects_names_the_positives(num_objects):
    torch.manual_seed(0)
    targets = random_targets(num_objects, C)
    denoising = Denoising(D, C, groups=2, box_noise=0.0, label_noise=0.0)
    noisy, padding = add_noisy(denoising, targets)
    matching = denoising.matching(targets, num_layers=3)
    assert len(matching.layers) == 3 * 2 * sum(num_objects)
    assert not padding[matching.images, matching.queries].any()
    if sum(num_objects):
        truth = torch.cat([t.boxes_cxcywh for t in targets]).clamp(max=1)
        found = noisy.reference[matching.images, matching.queries]
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (found, truth[matching.targets])]
        assert_close(corners[0], corners[1].clamp(0, 1), 1e-3)
        pairs = torch.stack([matching.layers, matching.images, matching.queries])
        assert pairs.unique(dim=1).shape == pairs.shape
        size = 2 * max(num_objects)
        assert (matching.queries % size < max(num_objects)).all()


# The dense head


def dense_case(num_objects=(3, 0, 1)):
    scales = make_scales([8, 16], [(96, 128)] * len(num_objects))
    sizes = torch.tensor([[128.0, 96.0]]).expand(len(num_objects), -1)
    head = randomize(DenseHead(D, C, num_cells=6))
    with torch.no_grad():  # boxes stay near their cells, so that objects and boxes overlap
        head.cells.box_embed[-2].weight.mul_(0.2)
    return head, scales, sizes, random_targets(num_objects, C)


def test_an_object_takes_its_best_aligned_cells():
    """Against a loop over objects."""
    head, scales, sizes, targets = dense_case()
    predictions, matching = head(scales, sizes, targets)
    cells = head.cells(scales, sizes)
    first = 0
    for image, target in enumerate(targets):
        boxes = box_convert(predictions.boxes_cxcywh[0, image], "cxcywh", "xyxy")
        corners = box_convert(target.boxes_cxcywh, "cxcywh", "xyxy")
        iou = box_iou(corners, boxes)
        probability = cells.logits[image].sigmoid()[:, target.labels].T
        centers, best = cells.boxes[image, :, :2], []
        for t, (box, center) in enumerate(zip(corners, target.boxes_cxcywh[:, :2])):
            inside = ((centers > box[:2]) & (centers < box[2:])).all(-1)
            inside[(centers - center).norm(dim=-1).argmin()] = True
            alignment = probability[t] * iou[t] ** 6 * inside
            best.append([i.item() for i in alignment.argsort(descending=True)[:6] if inside[i]])
        for t, taken in enumerate(best):
            rivals = [u for u in range(len(best)) if u != t]
            won = {i for i in taken if all(iou[t, i] > iou[u, i] for u in rivals if i in best[u])}
            mine = (matching.images == image) & (matching.targets == first + t)
            mine &= matching.weights > 0
            assert set(matching.queries[mine].tolist()) == won
            if won:
                assert_close(matching.weights[mine].max(), iou[t, list(won)].max(), 1e-4)
        first += len(target.labels)


def test_a_tiny_object_takes_the_nearest_cell():
    head, scales, sizes, targets = dense_case([1])
    targets[0].boxes_cxcywh[:] = torch.tensor([0.41, 0.41, 0.004, 0.004])
    _, matching = head(scales, sizes, targets)
    (cell,) = matching.queries[matching.weights > 0]
    centers = head.cells(scales, sizes).boxes[0, :, :2]
    assert cell == (centers - 0.41).norm(dim=-1).argmin()


def test_a_dense_head_without_objects_or_with_one_cell():
    head, scales, sizes, targets = dense_case([0, 0])
    assert len(head(scales, sizes, targets)[1].layers) == 0
    cells = Cells(
        torch.zeros(1, 1, D), torch.zeros(1, 1, C), random_boxes(1, 1), torch.ones(1, 1) > 0
    )
    matching = head.assign(cells, cells.boxes, random_targets([2], C))
    assert (matching.weights > 0).sum() == 1


# The whole model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_smca_config(tmp_path_factory.mktemp("plus"), "smca_plus")


def make_items(num_objects, size=(90, 120)):
    items = []
    for index, target in enumerate(random_targets(num_objects, 3)):
        boxes = box_convert(target.boxes_cxcywh, "cxcywh", "xyxy").clamp(0, 1)
        boxes = boxes * torch.tensor([size[1], size[0]] * 2)
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=target.labels)
        image = torch.from_numpy(make_image(*size, seed=index)).permute(2, 0, 1)
        items.append({"image": image, "instances": instances})
    return items


@pytest.mark.parametrize("num_objects", [[3, 1], [0, 2], [0, 0]], ids=str)
def test_every_parameter_gets_a_gradient(config, num_objects):
    model = instantiate(LazyConfig.load(config).model).train()
    losses = model(make_items(num_objects))
    parts = ("", "_0", "_enc", "_dn", "_dense")
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    assert set(losses) == {kind + part for kind in kinds for part in parts}
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_noisy_objects_leave_the_other_losses_alone(config):
    cfg = LazyConfig.load(config).model
    cfg.dropout = 0.0
    model, items = randomize(instantiate(cfg)).train(), make_items([3, 1])
    losses = model(items)
    model.denoising = None
    expected = model(items)
    assert expected.keys() == {name for name in losses if not name.endswith("_dn")}
    for name, value in expected.items():
        assert_close(losses[name], value, 1e-5)


def test_parts_of_different_kinds_are_an_error(config):
    model = LazyConfig.load(config).model
    for changes, message in (
        (dict(queries=None), "^decoder.refine=True and queries with boxes need"),
        (dict(queries=None, decoder={**model.decoder, "refine": False}), "^denoising needs"),
    ):
        with pytest.raises(ValueError, match=message):
            instantiate({**model, **changes})


def test_a_record_has_heads_and_maps_in_pixels_of_the_image(config):
    model = make_smca(config).eval()
    outputs = []
    model.decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    _, records = detect_and_record(Predictor.from_model(model), make_image(96, 128))
    record, size = records[-1], (192, 256)
    queries = torch.arange(6)
    boxes = outputs[0].references[-1, 0]
    assert_close(record.centers_in_pixels(queries, size), boxes[:, :2] * torch.tensor([256, 192]))
    centers, maps = record.heads(queries, size)
    modulation = model.decoder.layers[-1].modulation
    first = record.weight_maps[0]
    expected = (first.centers[0] + 0.5) * record.strides[0] * 2
    assert_close(centers[:, 0], expected.transpose(0, 1), 1e-4)
    spreads = first.spreads[0].abs().transpose(0, 1)
    half = boxes[:, None, 2:] * torch.tensor([128, 96]) / 2
    unit = half.clamp(min=0.5 * record.strides[0]) * 2
    radii = unit / spreads / 2**0.5
    assert modulation.in_boxes and maps.shape[-2:] == size
    # The map is 1 at the center of a head.
    inside = (centers[:, 0] > 1).all(-1) & (centers[:, 0] < torch.tensor([254, 190])).all(-1)
    for query, head in inside.nonzero().tolist():
        x, y = centers[query, 0, head].round().long()
        if radii[query, head].min() > 8:
            assert maps[query, 0, head, y, x] > 0.98
