// Colours computed in OKLCH: lightness falls or rises evenly from no use to most use, so that the order survives every kind of colour
// vision and a grey print; hue goes from yellow over green and blue to violet as an addition.

const STEPS = 256;

/** sRGB bytes of a lightness (0..1), chroma and hue in degrees. */
function oklch(lightness, chroma, degrees) {
  const a = chroma * Math.cos((degrees * Math.PI) / 180);
  const b = chroma * Math.sin((degrees * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const clipped = Math.min(1, Math.max(0, value));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
}

function ramp(colour) {
  return Array.from({ length: STEPS }, (_, step) => colour(step / (STEPS - 1)));
}

const mix = (from, to, t) => from + (to - from) * t;

// Zero is nearly the paper; the most is the farthest from it.
const LIGHT = ramp((t) =>
  oklch(mix(0.965, 0.3, t), 0.012 + 0.115 * Math.sin(Math.PI * Math.min(1, 0.1 + 0.8 * t)) * Math.min(1, 6 * t), mix(112, 300, t)),
);
const DARK = ramp((t) =>
  oklch(mix(0.25, 0.93, t), 0.012 + 0.115 * Math.sin(Math.PI * Math.min(1, 0.1 + 0.8 * t)) * Math.min(1, 6 * t), mix(300, 112, t)),
);
const TWO_WAYS_LIGHT = ramp((t) => oklch(0.96 - 0.5 * Math.abs(2 * t - 1), 0.15 * Math.abs(2 * t - 1), t < 0.5 ? 252 : 55));
const TWO_WAYS_DARK = ramp((t) => oklch(0.26 + 0.55 * Math.abs(2 * t - 1), 0.15 * Math.abs(2 * t - 1), t < 0.5 ? 252 : 60));

const scheme = matchMedia("(prefers-color-scheme: dark)");
let dark = scheme.matches; // asked once: a map has half a million cells
scheme.addEventListener("change", () => {
  dark = scheme.matches;
});

/** [r, g, b] of a value from 0 (none) to 1 (most). */
export function oneWay(t) {
  return (dark ? DARK : LIGHT)[step(t)];
}

/** [r, g, b] of a value from -1 (blue) over 0 (paper) to 1 (orange). */
export function twoWays(t) {
  return (dark ? TWO_WAYS_DARK : TWO_WAYS_LIGHT)[step((t + 1) / 2)];
}

const step = (t) => Math.round(Math.min(1, Math.max(0, t)) * (STEPS - 1));

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** Calls `redraw` whenever the reader changes between light and dark. */
export function onSchemeChange(redraw) {
  scheme.addEventListener("change", redraw);
}
