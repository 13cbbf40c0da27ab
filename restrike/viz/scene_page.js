"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const gl = canvas.getContext("webgl2", { antialias: true });
const FOV = 0.8;
const CLICK = 5;  // pixels that a pointer may stray in a click
const REACH = 18;  // pixels around a click in which a camera or a point is found
const MOVE_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 420;

// Vectors are arrays of 3; a rotation is its three rows: the view's right, up and backward axes in the world.
const add = (a, b, s = 1) => a.map((x, i) => x + s * b[i]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const scale = (a, s) => a.map((x) => x * s);
const unit = (a) => scale(a, 1 / (Math.hypot(...a) || 1));
const mix = (a, b, t) => a + t * (b - a);
const turned = (v, axis, angle) => {
  const c = Math.cos(angle), s = Math.sin(angle);
  return add(add(scale(v, c), cross(axis, v), s), axis, dot(axis, v) * (1 - c));
};
const short = (x) => Number(x.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });

function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), made = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) made[i] = raw.charCodeAt(i);
  return made;
}

const RAMPS = { depth: bytes(DATA.ramps.depth), confidence: bytes(DATA.ramps.confidence) };
const viewer = {
  scene: null, layers: [], chosen: -1, kind: "photo", pointsShown: 0, view: null, through: null, moving: null, asked: false,
  painted: null,
};
window.viewer = viewer;

// ------------------------------------------------------------------------------------------------ drawing with WebGL

const POINTS = `
  in vec3 position; in vec3 color; in float confidence;
  uniform mat4 matrix; uniform vec3 source; uniform float spread, pixels, least, smallest;
  out vec3 shade;
  void main() {
    shade = color;
    gl_Position = matrix * vec4(position, 1.0);
    if (confidence * 255.0 + 0.5 < least) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
    // A point is as wide as its share of the picture that it comes from, so that surfaces close when one comes near.
    float width = spread > 0.0 ? spread * distance(position, source) * pixels / max(gl_Position.w, 1e-9) : 2.0 * smallest;
    gl_PointSize = clamp(width, smallest, 64.0 * smallest);
  }`;
const DISC = `
  in vec3 shade; out vec4 result;
  void main() {
    vec2 at = 2.0 * gl_PointCoord - 1.0;
    if (dot(at, at) > 1.3) discard;  // between a disc and its square: round, yet without holes between neighbours
    result = vec4(shade, 1.0);
  }`;
const SCREEN = `
  out vec2 at;
  void main() { at = vec2((gl_VertexID << 1) & 2, gl_VertexID & 2); gl_Position = vec4(2.0 * at - 1.0, 0.0, 1.0); }`;
// Eye-dome lighting (Boucheny 2009): darker where neighbours on the screen are nearer.
const DOME = `
  in vec2 at; uniform sampler2D colors; uniform highp sampler2D depths; uniform vec2 planes; uniform float radius, strength;
  out vec4 result;
  float reach(vec2 where) {
    float z = 2.0 * texture(depths, where).r - 1.0;
    return log2(2.0 * planes.x * planes.y / (planes.x + planes.y - z * (planes.y - planes.x)));
  }
  void main() {
    float depth = texture(depths, at).r;
    if (depth >= 1.0) discard;
    float own = reach(at), sum = 0.0;
    vec2 texel = radius / vec2(textureSize(depths, 0));
    for (int k = 0; k < 8; k++) {
      float angle = 0.785398 * float(k);
      sum += min(0.12, max(0.0, own - reach(at + texel * vec2(cos(angle), sin(angle)))));
    }
    result = vec4(texture(colors, at).rgb * exp(-strength * sum), 1.0);
    gl_FragDepth = depth;
  }`;
const LINES = `
  in vec3 position; uniform mat4 matrix; uniform vec3 center; uniform float grow;
  void main() { gl_Position = matrix * vec4(center + grow * (position - center), 1.0); }`;
const PICTURE = `
  in vec3 position; in vec2 corner; uniform mat4 matrix; uniform vec3 center; uniform float grow; out vec2 at;
  void main() { at = corner; gl_Position = matrix * vec4(center + grow * (position - center), 1.0); }`;

function program(vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, "#version 300 es\nprecision highp float;\n" + text);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  const at = { program: made };
  for (let i = 0; i < gl.getProgramParameter(made, gl.ACTIVE_UNIFORMS); i++) {
    const { name } = gl.getActiveUniform(made, i);
    at[name] = gl.getUniformLocation(made, name);
  }
  for (let i = 0; i < gl.getProgramParameter(made, gl.ACTIVE_ATTRIBUTES); i++) {
    const { name } = gl.getActiveAttrib(made, i);
    at[name] = gl.getAttribLocation(made, name);
  }
  return at;
}

function buffer(values) {
  const made = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, made);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
  return made;
}

function attribute(location, source, size, type = gl.FLOAT, normalized = false) {
  gl.bindBuffer(gl.ARRAY_BUFFER, source);
  gl.enableVertexAttribArray(location);
  gl.vertexAttribPointer(location, size, type, normalized, 0, 0);
}

function texture(filter) {
  const made = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, made);
  for (const key of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, key, gl.CLAMP_TO_EDGE);
  for (const key of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, key, filter);
  return made;
}

function makeTarget(width, height) {
  const old = viewer.target;
  if (old && old.width === width && old.height === height) return old;
  if (old) { gl.deleteTexture(old.colors); gl.deleteTexture(old.depths); gl.deleteFramebuffer(old.frame); }
  const target = { width, height, frame: gl.createFramebuffer(), colors: texture(gl.NEAREST) };
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, width, height, 0, gl.RGBA, gl.UNSIGNED_BYTE, null);
  target.depths = texture(gl.NEAREST);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.DEPTH_COMPONENT24, width, height, 0, gl.DEPTH_COMPONENT, gl.UNSIGNED_INT, null);
  gl.bindFramebuffer(gl.FRAMEBUFFER, target.frame);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, target.colors, 0);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.DEPTH_ATTACHMENT, gl.TEXTURE_2D, target.depths, 0);
  viewer.target = target;
  return target;
}

function start() {
  const flat = "uniform vec3 color; out vec4 result; void main() { result = vec4(color, 1.0); }";
  viewer.programs = {
    points: program(POINTS, DISC),
    dome: program(SCREEN, DOME),
    lines: program(LINES, flat),
    picture: program(PICTURE,
      "in vec2 at; uniform sampler2D image; out vec4 result; void main() { result = vec4(texture(image, at).rgb, 1.0); }"),
  };
  viewer.corners = buffer(new Float32Array([0, 0, 1, 0, 1, 1, 0, 1]));
  gl.enable(gl.DEPTH_TEST);
  DATA.scenes.forEach((scene, i) => $("scene").add(new Option(scene.title, i)));
  $("scene").hidden = DATA.scenes.length < 2;
  $("title").textContent = DATA.title;
  openScene(0);
}

function openScene(number) {
  for (const layer of viewer.layers) {
    for (const name of ["position", "color", "confidence", "lines", "quad"]) gl.deleteBuffer(layer[name] || null);
    gl.deleteTexture(layer.texture || null);
  }
  gl.deleteBuffer(viewer.path || null);
  viewer.scene = DATA.scenes[number];
  viewer.layers = viewer.scene.layers.map(upload);
  const centers = viewer.layers.filter((layer) => layer.center).map((layer) => layer.center);
  viewer.path = buffer(new Float32Array(centers.flat()));
  viewer.pathLength = centers.length;
  $("confidence-row").hidden = !viewer.scene.confidence_values;
  $("confidence").value = 0;
  $("grow").value = Math.max(0.25, Math.min(1.6, Math.sqrt(20 / Math.max(1, centers.length))));
  $("views-title").textContent = viewer.layers.length === 1 ? "1 view" : `${viewer.layers.length} views`;
  $("layers").replaceChildren(...viewer.layers.map(entry));
  const first = viewer.layers.findIndex((layer) => layer.spec.picture);
  $("inspector").hidden = first < 0;
  viewer.chosen = -1;
  if (first >= 0) choose(first);
  viewer.view = null;
  reset();
}

function upload(spec) {
  const count = spec.count, confidence = spec.confidence ? bytes(spec.confidence) : new Uint8Array(count).fill(255);
  const layer = { spec, count, visible: true, atLeast: new Uint32Array(257) };
  for (const value of confidence) layer.atLeast[value] += 1;
  for (let value = 255; value >= 0; value--) layer.atLeast[value] += layer.atLeast[value + 1];
  layer.levels = confidence;
  layer.points = new Float32Array(bytes(spec.points).buffer);
  layer.position = buffer(layer.points);
  layer.color = buffer(bytes(spec.colors));
  layer.confidence = buffer(confidence);
  layer.maps = {};
  if (!spec.camera) return layer;
  const { width, height, fx, fy, frustum } = spec.camera, [center, ...image] = frustum;
  layer.center = center;
  layer.spread = count ? Math.sqrt((width * height) / (fx * fy * count)) : 0;
  layer.lines = buffer(new Float32Array(image.flatMap((corner, i) => [center, corner, corner, image[(i + 1) % 4]]).flat()));
  layer.quad = buffer(new Float32Array(image.flat()));
  if (spec.picture) decode(spec.picture, (picture) => {
    layer.texture = texture(gl.LINEAR);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, picture);
    ask();
  });
  return layer;
}

function decode(source, then) {
  const picture = new Image();
  picture.onload = () => then(picture);
  picture.src = source;
}

function matrix() {
  const { target, distance, rotation, fov, shift } = viewer.view;
  const eye = add(target, rotation[2], distance);
  const aspect = canvas.width / canvas.height, f = 1 / Math.tan(fov / 2);
  const reach = Math.hypot(...add(eye, viewer.scene.center, -1)) + 4 * viewer.scene.radius;
  const near = Math.max(1e-4 * reach, Math.min(distance, reach) * 0.01), far = 20 * reach;
  const rows = [
    [...scale(rotation[0], f / aspect), 0], [...scale(rotation[1], f), 0],
    [...scale(rotation[2], -(far + near) / (far - near)), 0], [...scale(rotation[2], -1), 0],
  ];
  for (let k = 0; k < 3; k++) {  // the principal point: image plane moved against the axis
    rows[0][k] += (f / aspect) * shift[0] * rotation[2][k];
    rows[1][k] += f * shift[1] * rotation[2][k];
  }
  for (const row of rows) row[3] = -dot(row, eye);
  rows[2][3] -= (2 * far * near) / (far - near);
  const columns = new Float32Array(16);
  rows.forEach((row, i) => row.forEach((value, j) => { columns[4 * j + i] = value; }));
  return { columns, near, far };
}

function ask() {
  if (viewer.asked) return;
  viewer.asked = true;
  requestAnimationFrame(draw);
}

function draw() {
  viewer.asked = false;
  advance();
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const [width, height] = [box.width * ratio, box.height * ratio].map((x) => Math.max(1, Math.round(x)));
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const isShaded = $("shade").checked, view = matrix(), least = Number($("confidence").value);
  const shown = viewer.layers.filter((layer) => layer.visible);
  const target = isShaded ? makeTarget(width, height) : null;
  gl.viewport(0, 0, width, height);
  clear(null);
  if (target) clear(target.frame);
  for (const layer of shown) drawPoints(layer, view.columns, least, ratio);
  if (target) drawDome(target, view, ratio);
  if ($("cameras").checked) shown.forEach((layer) => drawCamera(layer, view.columns));
  if ($("path").checked && viewer.pathLength > 1) drawLines(view.columns, viewer.path, gl.LINE_STRIP, viewer.pathLength, [150, 160, 180]);
  viewer.pointsShown = shown.reduce((sum, layer) => sum + layer.atLeast[least], 0);
  report(shown.length, least);
  if (viewer.moving) ask();
}

function clear(frame) {
  gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
}

function drawPoints(layer, columns, least, ratio) {
  if (!layer.count) return;
  const p = viewer.programs.points;
  gl.useProgram(p.program);
  gl.uniformMatrix4fv(p.matrix, false, columns);
  gl.uniform3f(p.source, ...(layer.center || [0, 0, 0]));
  gl.uniform1f(p.spread, (layer.spread || 0) * Number($("size").value));
  gl.uniform1f(p.pixels, canvas.height / (2 * Math.tan(viewer.view.fov / 2)));
  gl.uniform1f(p.smallest, 1.2 * ratio * Math.sqrt(Number($("size").value)));
  gl.uniform1f(p.least, least);
  attribute(p.position, layer.position, 3);
  attribute(p.color, layer.color, 3, gl.UNSIGNED_BYTE, true);
  attribute(p.confidence, layer.confidence, 1, gl.UNSIGNED_BYTE, true);
  gl.drawArrays(gl.POINTS, 0, layer.count);
  for (const name of ["position", "color", "confidence"]) gl.disableVertexAttribArray(p[name]);
}

function drawDome(target, view, ratio) {
  const p = viewer.programs.dome;
  gl.bindFramebuffer(gl.FRAMEBUFFER, null);
  gl.useProgram(p.program);
  gl.activeTexture(gl.TEXTURE1);
  gl.bindTexture(gl.TEXTURE_2D, target.depths);
  gl.activeTexture(gl.TEXTURE0);
  gl.bindTexture(gl.TEXTURE_2D, target.colors);
  gl.uniform1i(p.colors, 0);
  gl.uniform1i(p.depths, 1);
  gl.uniform2f(p.planes, view.near, view.far);
  gl.uniform1f(p.radius, 1.4 * ratio);
  gl.uniform1f(p.strength, viewer.through ? 0 : 1.1);  // through a camera, colours are compared with the photo's
  gl.drawArrays(gl.TRIANGLES, 0, 3);
}

function drawLines(columns, source, mode, count, color, center = [0, 0, 0], grow = 1) {
  const p = viewer.programs.lines;
  gl.useProgram(p.program);
  gl.uniformMatrix4fv(p.matrix, false, columns);
  gl.uniform3f(p.center, ...center);
  gl.uniform1f(p.grow, grow);
  gl.uniform3f(p.color, ...color.map((value) => value / 255));
  attribute(p.position, source, 3);
  gl.drawArrays(mode, 0, count);
  gl.disableVertexAttribArray(p.position);
}

function drawCamera(layer, columns) {
  if (!layer.lines || viewer.through === layer) return;
  const isChosen = viewer.layers[viewer.chosen] === layer, grow = Number($("grow").value) * (isChosen ? 1.35 : 1);
  const bright = isChosen ? ($("light").checked ? [0, 0, 0] : [255, 255, 255]) : layer.spec.color;
  drawLines(columns, layer.lines, gl.LINES, 16, bright, layer.center, grow);
  if (!$("images").checked || !layer.texture) return;
  const p = viewer.programs.picture;
  gl.useProgram(p.program);
  gl.uniformMatrix4fv(p.matrix, false, columns);
  gl.uniform3f(p.center, ...layer.center);
  gl.uniform1f(p.grow, grow);
  gl.bindTexture(gl.TEXTURE_2D, layer.texture);
  attribute(p.position, layer.quad, 3);
  attribute(p.corner, viewer.corners, 2);
  gl.drawArrays(gl.TRIANGLE_FAN, 0, 4);
  for (const name of ["position", "corner"]) gl.disableVertexAttribArray(p[name]);
}

function report(shown, least) {
  $("size-value").textContent = `× ${Number($("size").value).toFixed(1)}`;
  $("grow-value").textContent = `× ${Number($("grow").value).toFixed(2)}`;
  const values = viewer.scene.confidence_values;
  if (values) $("confidence-value").textContent = least ? `≥ ${short(values[least])}` : "all";
  $("status").textContent = `${viewer.pointsShown.toLocaleString("en")} points · ${shown} of ${viewer.layers.length} views`;
}

// ---------------------------------------------------------------------------------------------- where one looks from

function goTo(view, through = null) {
  viewer.moving = viewer.view && MOVE_MS ? { from: viewer.view, to: view, since: performance.now() } : null;
  if (!viewer.moving) viewer.view = view;
  viewer.through = through;
  $("through").hidden = !through;
  $("blend").value = 0;
  if (through) $("through-name").textContent = through.spec.name;
  placeOverlay();
  ask();
}

function advance() {
  if (!viewer.moving) return;
  const { from, to, since } = viewer.moving, t = Math.min(1, (performance.now() - since) / MOVE_MS);
  const s = t * t * (3 - 2 * t), at = (name) => from[name].map((x, i) => mix(x, to[name][i], s));
  const back = unit(from.rotation[2].map((x, i) => mix(x, to.rotation[2][i], s)));
  const right = unit(cross(from.rotation[1].map((x, i) => mix(x, to.rotation[1][i], s)), back));
  const isSound = Math.hypot(...right) > 0.5 && Math.hypot(...back) > 0.5;  // halfway between opposites there is none
  viewer.view = t === 1 || !isSound ? to : {
    target: at("target"), distance: Math.exp(mix(Math.log(from.distance), Math.log(to.distance), s)),
    rotation: [right, cross(back, right), back], fov: mix(from.fov, to.fov, s), shift: at("shift"),
  };
  if (t === 1) viewer.moving = null;
}

function settle() {  // a hand on the view ends what is going on
  if (viewer.moving) { viewer.view = viewer.moving.to; viewer.moving = null; }
  if (viewer.through) { viewer.through = null; $("through").hidden = true; placeOverlay(); }
}

function reset() {
  const { center, radius, up } = viewer.scene;
  const cameras = viewer.layers.filter((layer) => layer.center);
  let back = [0, 0, 1];
  if (cameras.length) {  // from behind the first camera
    back = unit(add(cameras[0].center, center, -1));
    if (Math.hypot(...cross(up, back)) < 0.05) back = unit(add(back, unit(cross(up, [0.3, 0.5, 0.8]))));
  }
  const right = unit(cross(up, back));
  back = unit(turned(turned(back, up, 0.35), right, -0.3));
  const side = unit(cross(up, back));
  goTo(fitted({ target: center, distance: 2.1 * radius, rotation: [side, cross(back, side), back], fov: FOV, shift: [0, 0] }));
}

/** A view of the same direction that all cameras and nearly all points fit into, whatever the window's shape. */
function fitted(view) {
  const places = viewer.layers.filter((layer) => layer.center).map((layer) => layer.center), cameras = places.length;
  const stride = Math.max(1, Math.ceil(viewer.layers.reduce((sum, layer) => sum + layer.count, 0) / 4000));
  for (const { points, count } of viewer.layers) {
    for (let i = 0; i < count; i += stride) places.push([points[3 * i], points[3 * i + 1], points[3 * i + 2]]);
  }
  const half = Math.tan(view.fov / 2), aspect = canvas.clientWidth / canvas.clientHeight || 1;
  for (let round = 0; round < 10; round++) {
    const { rotation: [right, up, back], target, distance } = view, eye = add(target, back, distance);
    const range = (axis, room) => {
      const seen = places.map((place) => dot(add(place, eye, -1), axis) / (half * room * Math.max(-dot(add(place, eye, -1), back), 0.05 * distance)));
      const points = seen.slice(cameras).sort((a, b) => a - b), at = (share) => points[Math.floor(share * (points.length - 1))];
      const ends = [...seen.slice(0, cameras), ...(points.length ? [at(0.03), at(0.97)] : [])];
      return [Math.min(...ends), Math.max(...ends)];
    };
    const [x, y] = [range(right, aspect), range(up, 1)].map(([low, high]) => ({ middle: (low + high) / 2, reach: (high - low) / 2 }));
    const aside = add(scale(right, x.middle * aspect), up, y.middle);
    const factor = Math.max(x.reach, y.reach) / 0.82;
    view = { ...view, target: add(target, aside, half * distance), distance: distance * Math.min(2, Math.max(0.3, factor)) };
  }
  return view.target.every(Number.isFinite) && view.distance > 0 ? view : { ...view, target: viewer.scene.center, distance: 2 * viewer.scene.radius };
}

function lookThrough(layer) {
  if (!layer || !layer.spec.camera) return;
  const { rotation: [right, down, forward], width, height, fx, fy, cx, cy } = layer.spec.camera;
  const ahead = dot(add(viewer.scene.center, layer.center, -1), forward);
  const distance = ahead > 0.05 * viewer.scene.radius ? ahead : viewer.scene.radius;
  goTo({
    target: add(layer.center, forward, distance), distance, fov: 2 * Math.atan(halfHeight(layer)),
    rotation: [right, scale(down, -1), scale(forward, -1)], shift: [(width / 2 - cx) / fx, -(height / 2 - cy) / fy],
  }, layer);
}

/** Half the window's height at depth 1, such that the whole photo fits, whatever the window's shape. */
function halfHeight(layer) {
  const { width, height, fx, fy } = layer.spec.camera, aspect = canvas.clientWidth / canvas.clientHeight || 1;
  return Math.max(height / 2 / fy, width / 2 / fx / aspect);
}

function placeOverlay() {
  const overlay = $("overlay"), layer = viewer.through;
  overlay.hidden = !layer || !layer.spec.picture;
  if (overlay.hidden) return;
  const { width, height, fx, fy } = layer.spec.camera, scaleTo = canvas.clientHeight / 2 / halfHeight(layer);
  const wide = (width / fx) * scaleTo, tall = (height / fy) * scaleTo;
  overlay.src = layer.spec.picture;
  overlay.style.opacity = $("blend").value;
  Object.assign(overlay.style, {
    width: `${wide}px`, height: `${tall}px`,
    left: `${(canvas.clientWidth - wide) / 2}px`, top: `${(canvas.clientHeight - tall) / 2}px`,
  });
}

function turn(dx, dy) {
  const view = viewer.view, up = viewer.scene.up;
  const leaning = view.rotation.map((axis) => turned(axis, up, -dx));
  const rotation = leaning.map((axis) => turned(axis, leaning[0], -dy));
  // Not over the top, where left and right would change places.
  const canTip = dot(rotation[1], up) > 0.02 || dot(rotation[1], up) > dot(leaning[1], up);
  viewer.view = { ...view, rotation: canTip ? rotation : leaning, shift: [0, 0] };
}

function move(dx, dy) {
  const view = viewer.view, step = (2 * view.distance * Math.tan(view.fov / 2)) / canvas.clientHeight;
  viewer.view = { ...view, target: add(add(view.target, view.rotation[0], -dx * step), view.rotation[1], dy * step) };
}

function zoom(factor) { viewer.view = { ...viewer.view, distance: viewer.view.distance * factor }; }

/** CSS pixels of a world point, and its depth; null behind the eye. */
function project(columns, x, y, z) {
  const w = columns[3] * x + columns[7] * y + columns[11] * z + columns[15];
  if (w <= 0) return null;
  const u = (columns[0] * x + columns[4] * y + columns[8] * z + columns[12]) / w;
  const v = (columns[1] * x + columns[5] * y + columns[9] * z + columns[13]) / w;
  return [(0.5 + 0.5 * u) * canvas.clientWidth, (0.5 - 0.5 * v) * canvas.clientHeight, w];
}

/** The camera whose picture is nearest to a click, or -1. */
function cameraAt(x, y) {
  if (!$("cameras").checked) return -1;
  const { columns } = matrix(), grow = Number($("grow").value);
  let best = -1, nearest = Infinity;
  viewer.layers.forEach((layer, number) => {
    if (!layer.visible || !layer.center) return;
    const corners = layer.spec.camera.frustum.map((p) => project(columns, ...add(layer.center, add(p, layer.center, -1), grow)));
    if (corners.some((corner) => !corner)) return;
    const xs = corners.map((c) => c[0]), ys = corners.map((c) => c[1]);
    const isInside = x > Math.min(...xs) - 4 && x < Math.max(...xs) + 4 && y > Math.min(...ys) - 4 && y < Math.max(...ys) + 4;
    if (isInside && corners[0][2] < nearest) [best, nearest] = [number, corners[0][2]];
  });
  return best;
}

/** The nearest of the points around a click, or null. */
function pointAt(x, y) {
  const { columns } = matrix(), least = Number($("confidence").value);
  let best = null, nearest = Infinity;
  for (const { points, levels, visible } of viewer.layers) {
    for (let i = 0; visible && i < levels.length; i++) {
      if (levels[i] < least) continue;
      const at = project(columns, points[3 * i], points[3 * i + 1], points[3 * i + 2]);
      if (!at || at[2] > nearest || Math.hypot(at[0] - x, at[1] - y) > REACH) continue;
      best = [points[3 * i], points[3 * i + 1], points[3 * i + 2]];
      nearest = at[2];
    }
  }
  return best;
}

// ------------------------------------------------------------------------------------ one view: photo, depth, confidence

function choose(number) {
  const count = viewer.layers.length;
  if (!count) return;
  viewer.chosen = (number + count) % count;
  viewer.layers.forEach((layer, i) => layer.row.setAttribute("aria-current", i === viewer.chosen));
  const { row, spec } = viewer.layers[viewer.chosen];
  const list = $("layers"), top = row.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + row.offsetHeight - list.clientHeight;
  $("view-name").textContent = spec.name;
  $("view-name").title = spec.name;
  $("look").disabled = !spec.camera;
  show(viewer.kind);
  ask();
}

function show(kind) {
  const { spec } = viewer.layers[viewer.chosen], has = { photo: spec.picture, depth: spec.depth, confidence: spec.sureness };
  viewer.kind = kind;
  const drawn = has[kind] ? kind : "photo";
  for (const tab of $("tabs").children) {
    tab.hidden = !viewer.layers.some(({ spec: { depth, sureness } }) => ({ photo: true, depth, confidence: sureness })[tab.dataset.kind]);
    tab.setAttribute("aria-selected", tab.dataset.kind === drawn);
  }
  $("legend").hidden = drawn === "photo";
  $("readout").hidden = true;
  if (drawn !== "photo") drawLegend(drawn);
  const layer = viewer.layers[viewer.chosen], isCurrent = () => viewer.layers[viewer.chosen] === layer && viewer.kind === kind;
  if (!has[drawn]) return $("map").getContext("2d").clearRect(0, 0, $("map").width, $("map").height);
  if (drawn === "photo") return decode(spec.picture, (picture) => isCurrent() && paintPhoto(picture));
  needMaps(layer, () => isCurrent() && paintMap(layer, drawn));
}

/** Levels of depth and confidence, from the pictures that carry them. */
function needMaps(layer, then) {
  const missing = [["depth", layer.spec.depth], ["confidence", layer.spec.sureness]].filter(([name, source]) => source && !layer.maps[name]);
  let waiting = missing.length;
  if (!waiting) return then();
  for (const [name, source] of missing) decode(source, (picture) => {
    const { width, height } = picture, board = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    board.drawImage(picture, 0, 0);
    const pixels = board.getImageData(0, 0, width, height).data;
    layer.maps[name] = { width, height, levels: Uint8Array.from({ length: width * height }, (_, i) => pixels[4 * i]) };
    if (--waiting === 0) then();
  });
}

function size(width, height) {
  const map = $("map"), room = map.parentElement.getBoundingClientRect();
  [map.width, map.height] = [width, height];
  const factor = Math.min(room.width / width, room.height / height);
  map.style.width = `${width * factor}px`;
  map.style.height = `${height * factor}px`;
  map.style.imageRendering = factor > 3 ? "pixelated" : "auto";
  return map.getContext("2d");
}

function paintPhoto(picture) {
  size(picture.naturalWidth, picture.naturalHeight).drawImage(picture, 0, 0);
  viewer.painted = ["photo", viewer.chosen];
}

function paintMap(layer, kind) {
  const { width, height, levels } = layer.maps[kind], sure = layer.maps.confidence, least = Number($("confidence").value);
  const board = size(width, height), image = board.createImageData(width, height), ramp = RAMPS[kind];
  for (let i = 0; i < levels.length; i++) {
    const isKnown = kind === "confidence" || levels[i] > 0, isShown = !sure || sure.levels[i] >= least;
    const level = kind === "depth" ? Math.round((levels[i] - 1) * (255 / 254)) : levels[i], strength = isShown ? 1 : 0.16;  // what the slider hides fades
    for (let k = 0; k < 3; k++) image.data[4 * i + k] = isKnown ? strength * ramp[3 * level + k] : 58;
    image.data[4 * i + 3] = 255;
  }
  board.putImageData(image, 0, 0);
  viewer.painted = [kind, viewer.chosen];
}

function depthOf(level) {
  const { low, high, is_log: isLog } = viewer.scene.depth_range, t = (level - 1) / 254;
  return isLog ? low * Math.pow(high / low, t) : mix(low, high, t);
}

function valueText(kind, level) {
  if (kind === "confidence") return `confidence ${short(viewer.scene.confidence_values[level])}`;
  if (!level) return "depth unknown";
  return `${level === 1 ? "≤ " : level === 255 ? "≥ " : ""}${short(depthOf(level))} ${viewer.scene.unit}`;
}

function drawLegend(kind) {
  const board = $("ramp").getContext("2d"), image = board.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...RAMPS[kind].slice(3 * i, 3 * i + 3), 255], 4 * i);
  board.putImageData(image, 0, 0);
  const values = viewer.scene.confidence_values;
  const ticks = kind === "depth" ? [1, 64.5, 128, 191.5, 255].map(depthOf) : [0, 64, 128, 191, 255].map((i) => values[i]);
  const texts = ticks.map(short);
  if (kind === "depth") texts[texts.length - 1] += ` ${viewer.scene.unit}`;
  $("ticks").replaceChildren(...texts.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
}

$("map").addEventListener("pointermove", (event) => {
  const map = viewer.layers[viewer.chosen].maps[viewer.kind], box = $("map").getBoundingClientRect();
  $("readout").hidden = !map || viewer.kind === "photo";
  if ($("readout").hidden) return;
  const x = Math.min(map.width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * map.width)));
  const y = Math.min(map.height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * map.height)));
  $("readout").textContent = valueText(viewer.kind, map.levels[y * map.width + x]);
});
$("map").addEventListener("pointerleave", () => { $("readout").hidden = true; });
$("map").addEventListener("click", () => lookThrough(viewer.layers[viewer.chosen]));

// ---------------------------------------------------------------------------------------------------- list and controls

function entry(layer, number) {
  const make = (tag, props = {}) => Object.assign(document.createElement(tag), props);
  const row = make("div", { className: "layer" }), { spec } = layer;
  const pick = make("button", { className: "pick", title: spec.name });
  if (spec.picture) {
    const picture = make("img", { alt: "", src: spec.picture });
    picture.style.borderColor = `rgb(${spec.color})`;
    pick.append(picture);
  } else row.classList.add("bare");
  pick.append(make("div", { className: "name", textContent: spec.name }),
    make("div", { className: "count", textContent: `${layer.count.toLocaleString("en")} points` }));
  pick.onclick = () => (viewer.chosen === number ? lookThrough(layer) : choose(number));
  const box = make("input", { type: "checkbox", checked: true });
  box.setAttribute("aria-label", `show ${spec.name}`);
  box.onchange = () => { setVisible(layer, box.checked); ask(); };
  Object.assign(layer, { row, box, pick });
  row.append(pick, box);
  return row;
}

function setVisible(layer, isVisible) {
  layer.visible = layer.box.checked = isVisible;
  layer.pick.classList.toggle("off", !isVisible);
}

const fingers = new Map();
let travelled = 0;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  travelled = 0;
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
canvas.addEventListener("pointermove", (event) => {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const now = [event.clientX, event.clientY], dx = now[0] - last[0], dy = now[1] - last[1];
  travelled += Math.hypot(dx, dy);
  if (travelled < CLICK) return;
  settle();
  if (fingers.size === 2) {
    const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
    const span = (at) => Math.hypot(at[0] - other[0], at[1] - other[1]) || 1;
    zoom(span(last) / span(now));
    move(dx / 2, dy / 2);
  } else if (event.shiftKey || event.buttons & 6) move(dx, dy);
  else turn(dx * 0.006, dy * 0.006);
  fingers.set(event.pointerId, now);
  ask();
});
canvas.addEventListener("click", (event) => {
  if (travelled >= CLICK) return;
  const box = canvas.getBoundingClientRect(), number = cameraAt(event.clientX - box.left, event.clientY - box.top);
  if (number >= 0 && viewer.layers[number].spec.picture) choose(number);
});
canvas.addEventListener("dblclick", (event) => {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const number = cameraAt(x, y), point = number < 0 ? pointAt(x, y) : null;
  if (number >= 0) lookThrough(viewer.layers[number]);
  else if (point) {
    const { rotation, target, distance } = viewer.view, eye = add(target, rotation[2], distance);
    const ahead = -dot(add(point, eye, -1), rotation[2]);
    goTo({ target: point, distance: Math.max(ahead, 1e-6), rotation, fov: FOV, shift: [0, 0] });
  }
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  settle();
  zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.03 : 0.001)));
  ask();
}, { passive: false });
canvas.addEventListener("contextmenu", (event) => event.preventDefault());

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isFree = !["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const current = viewer.layers[viewer.chosen];
  if (event.key === "r" || event.key === "R" || event.key === "Escape") reset();
  else if (isFree && step && current) {
    choose(viewer.chosen + step);
    if (viewer.through) lookThrough(viewer.layers[viewer.chosen]);
  } else if (isFree && event.key === "Enter") lookThrough(current);
});
window.addEventListener("resize", () => {
  if (viewer.through) lookThrough(viewer.through);
  if (viewer.chosen >= 0) show(viewer.kind);
  ask();
});
for (const id of ["size", "confidence", "grow", "cameras", "images", "path", "shade", "light"]) $(id).addEventListener("input", ask);
$("confidence").addEventListener("input", () => viewer.kind !== "photo" && show(viewer.kind));
$("light").addEventListener("input", () => document.documentElement.classList.toggle("light", $("light").checked));
$("blend").addEventListener("input", () => { $("overlay").style.opacity = $("blend").value; });
$("scene").addEventListener("change", () => openScene(Number($("scene").value)));
$("reset").onclick = reset;
$("leave").onclick = reset;
$("previous").onclick = () => choose(viewer.chosen - 1);
$("next").onclick = () => choose(viewer.chosen + 1);
$("look").onclick = () => lookThrough(viewer.layers[viewer.chosen]);
for (const tab of $("tabs").children) tab.onclick = () => show(tab.dataset.kind);
for (const [id, isShown] of [["all", () => true], ["none", () => false], ["only", (number) => number === viewer.chosen]]) {
  $(id).onclick = () => {
    viewer.layers.forEach((layer, number) => setVisible(layer, isShown(number)));
    ask();
  };
}

if (gl) start();
else {
  $("failure").style.display = "grid";
  $("failure").textContent = "This browser has no WebGL 2, which the 3-D view needs: try another, or turn on hardware acceleration.";
}
