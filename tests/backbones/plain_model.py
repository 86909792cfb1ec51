"""A second implementation of both models, as literal as possible: loops over tokens, from a state dict alone.

Whatever the options, a backbone must agree with this. It shares only the operators' definitions with the library.
"""

import torch
import torch.nn.functional as F

from vision_rwkv.ops.reference import bi_wkv, wkv6


def shift_loops(x, hw, pixels=1, gamma=0.25, heads=1):
    """Q-Shift token by token and channel by channel group: x (B, T, C)."""
    (h, w), dim, out = hw, x.shape[2] // heads, x.clone()
    for row in range(h):
        for column in range(w):
            sources = [(row, column - pixels), (row, column + pixels), (row - pixels, column), (row + pixels, column)]
            for quarter, (i, j) in enumerate(sources):
                start, end = int(dim * gamma * quarter), int(dim * gamma * (quarter + 1))
                for head in range(heads):
                    channels = slice(head * dim + start, head * dim + end)
                    inside = 0 <= i < h and 0 <= j < w
                    out[:, row * w + column, channels] = x[:, i * w + j, channels] if inside else 0
    return out


class Plain:
    """The model of ``state`` (tensors by name): forward(image) gives each layer's tokens, final norm included."""

    def __init__(self, state, patch, grid, post_norm=False, pixels=1, gamma=0.25, heads=None):
        self.p, self.patch, self.grid, self.post_norm = state, patch, grid, post_norm
        self.pixels, self.gamma, self.heads = pixels, gamma, heads

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.p[f'{name}.weight'], self.p[f'{name}.bias'], 1e-5)

    def norm_if(self, name, x):
        return self.norm(name, x) if f'{name}.weight' in self.p else x

    def linear(self, name, x):
        return x @ self.p[f'{name}.weight'].T

    def shift(self, x, hw):
        return shift_loops(x, hw, self.pixels, self.gamma, self.heads or 1) if self.pixels else x

    def mixed(self, name, x, xx):
        if not self.pixels:
            return x
        mix = self.p[name]
        return x * mix + xx * (1 - mix)

    def att(self, name, x, hw):
        xx, p, tokens = self.shift(x, hw), self.p, x.shape[1]
        k, v, r = (
            self.linear(f'{name}.{linear}', self.mixed(f'{name}.spatial_mix_{letter}', x, xx))
            for letter, linear in (('k', 'key'), ('v', 'value'), ('r', 'receptance'))
        )
        y = bi_wkv(p[f'{name}.spatial_decay'] / tokens, p[f'{name}.spatial_first'] / tokens, k, v)
        return self.linear(f'{name}.output', torch.sigmoid(r) * self.norm_if(f'{name}.key_norm', y))

    def att6(self, name, x, hw):
        p = {key[len(name) + 1 :]: value for key, value in self.p.items() if key.startswith(name + '.')}
        xx, inputs = self.shift(x, hw) - x, {}
        if self.pixels:
            z = torch.tanh((x + xx * p['time_maa_x']) @ p['time_maa_w1'])
        for i, letter in enumerate('wkvrg'):
            inputs[letter] = x
            if self.pixels:
                m = z[..., 32 * i : 32 * (i + 1)] @ p['time_maa_w2'][i]
                inputs[letter] = x + xx * (p[f'time_maa_{letter}'] + m)
        linears = (('r', 'receptance'), ('k', 'key'), ('v', 'value'), ('g', 'gate'))
        r, k, v, g = (self.linear(f'{name}.{linear}', inputs[letter]) for letter, linear in linears)
        w = -torch.exp(p['time_decay'] + torch.tanh(inputs['w'] @ p['time_decay_w1']) @ p['time_decay_w2'])
        r, k, v, w = (a.reshape(*a.shape[:2], self.heads, 64) for a in (r, k, v, w))
        y = self.norm_if(f'{name}.key_norm', wkv6(r, k, v, w, p['time_faaaa']).flatten(2)).view_as(v)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = y.flatten(2) * p['ln_x.weight'] + p['ln_x.bias']
        return self.linear(f'{name}.output', y * F.silu(g))

    def ffn(self, name, x, hw):
        xx = self.shift(x, hw)
        k = self.linear(f'{name}.key', self.mixed(f'{name}.spatial_mix_k', x, xx)).relu() ** 2
        r = self.linear(f'{name}.receptance', self.mixed(f'{name}.spatial_mix_r', x, xx))
        return torch.sigmoid(r) * self.linear(f'{name}.value', self.norm_if(f'{name}.key_norm', k))

    def branch(self, x, hw, mix, mix_name, norm_name, gamma_name):
        x = x if self.post_norm else self.norm(norm_name, x)
        y = mix(mix_name, x, hw)
        y = self.norm(norm_name, y) if self.post_norm else y
        return y * self.p.get(gamma_name, 1)

    def __call__(self, image):
        """Image (B, 3, H, W) -> the tokens (B, T, C) after each layer, and (h, w)."""
        p, s = self.p, self.patch
        image = F.pad(image, (0, -image.shape[3] % s, 0, -image.shape[2] % s))
        hw = h, w = image.shape[2] // s, image.shape[3] // s
        patches = [image[:, :, s * i : s * i + s, s * j : s * j + s].flatten(1) for i in range(h) for j in range(w)]
        x = torch.stack(patches, 1) @ p['patch_embed.projection.weight'].flatten(1).T + p['patch_embed.projection.bias']
        maps = p['pos_embed'].transpose(1, 2).unflatten(2, self.grid)
        x = x + F.interpolate(maps, size=hw, mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
        if 'cls_token' in p:
            x = torch.cat([x, p['cls_token'].expand(len(x), 1, -1)], 1)
        depth, outputs = 1 + max(int(name.split('.')[1]) for name in p if name.startswith('layers.')), []
        for i in range(depth):
            layer = f'layers.{i}'
            x = self.norm_if(f'{layer}.ln0', x)
            x = x + self.branch(
                x, hw, self.att6 if self.heads else self.att, f'{layer}.att', f'{layer}.ln1', f'{layer}.gamma1'
            )
            x = x + self.branch(x, hw, self.ffn, f'{layer}.ffn', f'{layer}.ln2', f'{layer}.gamma2')
            outputs.append(self.norm_if('ln1', x) if i == depth - 1 else x)
        return outputs, hw
