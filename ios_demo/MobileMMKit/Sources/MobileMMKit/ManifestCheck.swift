import Foundation

/// Checks what a manifest's types cannot say. Throws ``KeyFault`` at the first thing that does not hold together.
func checkAgreement(_ manifest: Manifest) throws {
    try fileFaults(manifest)
    try modelFaults(manifest)
    try tokenFaults(manifest)
    try drawingFaults(manifest)
    switch manifest.target {
    case "onnx": try onnxFaults(manifest)
    case "coreml": try coremlFaults(manifest)
    case "executorch": try executorchFaults(manifest)
    default: break
    }
}

private func fileFaults(_ manifest: Manifest) throws {
    var listed: [String: String] = [:]
    for (index, file) in manifest.files.enumerated() {
        let folded = file.path.lowercased()
        let key = "files.\(index).path"
        if folded == ModelBundle.manifestName || folded == ModelBundle.manifestDigestName {
            throw KeyFault(key, "the manifest cannot list itself")
        }
        if let other = listed.updateValue(file.path, forKey: folded) {
            throw KeyFault(key, "\(shown(file.path)) and \(shown(other)) are one file on some phones")
        }
    }
    let sizes = Dictionary(manifest.files.map { ($0.path, $0.bytes) }, uniquingKeysWith: { first, _ in first })
    func known(_ key: String, _ path: String) throws {
        if sizes[path] == nil { throw KeyFault(key, "\(shown(path)) is not listed under 'files'") }
    }
    if manifest.parts.isEmpty { throw KeyFault("parts", "there is none") }
    for (name, part) in manifest.parts.sorted(by: { $0.key < $1.key }) {
        for (index, path) in part.files.enumerated() { try known("parts.\(name).files.\(index)", path) }
        if Set(part.files).count < part.files.count {
            throw KeyFault("parts.\(name).files", "a file stands there twice")
        }
        let isPackage =
            manifest.target == "coreml" && part.files.allSatisfy { $0.hasPrefix("\(part.file)/") }
        if !part.files.contains(part.file) && !isPackage {
            throw KeyFault("parts.\(name).file", "\(shown(part.file)) is not among the part's 'files'")
        }
        let total = part.files.reduce(0) { $0 + sizes[$1]! }
        if part.bytes != total {
            throw KeyFault("parts.\(name).bytes", "is \(part.bytes), but the part's files have \(total)")
        }
        for (side, tensors) in [("inputs", part.inputs), ("outputs", part.outputs)]
        where Set(tensors.map(\.name)).count < tensors.count {
            throw KeyFault("parts.\(name).\(side)", "two have one name")
        }
    }
    try known("prompt.tokenizer", manifest.prompt.tokenizer)
    for (index, golden) in manifest.golden.enumerated() {
        try known("golden.\(index).file", golden.file)
        if manifest.parts[golden.part] == nil {
            throw KeyFault("golden.\(index).part", "there is no part \(shown(golden.part))")
        }
    }
    for (index, conversation) in manifest.conversations.enumerated() {
        guard let picture = conversation.image else { continue }
        try known("conversations.\(index).image", picture)
        if manifest.image == nil {
            throw KeyFault("conversations.\(index).image", "the bundle takes no pictures (key 'image' is null)")
        }
    }
}

private func modelFaults(_ manifest: Manifest) throws {
    let model = manifest.model
    if model.numAttentionHeads % model.numKeyValueHeads != 0 {
        throw KeyFault("model.num_key_value_heads", "does not divide the \(model.numAttentionHeads) attention heads")
    }
    guard let image = manifest.image else { return }
    if model.numImageTokens < 1 || model.numImageTokens >= model.contextLength {
        throw KeyFault(
            "model.num_image_tokens",
            "is \(model.numImageTokens); a picture must leave room in a context of \(model.contextLength)")
    }
    if (image.strategy == "crop") != (image.shortestEdge != nil) {
        throw KeyFault("image.shortest_edge", "must be given with the strategy \"crop\" and with no other")
    }
    if let edge = image.shortestEdge, edge < max(image.height, image.width) {
        throw KeyFault("image.shortest_edge", "is less than what is cut out (\(image.height) × \(image.width))")
    }
    if let grid = image.positionGrid, grid[0] * grid[1] != model.numImageTokens {
        throw KeyFault("image.position_grid", "is not that of \(model.numImageTokens) image tokens")
    }
}

private func tokenFaults(_ manifest: Manifest) throws {
    let model = manifest.model
    func known(_ key: String, _ ids: [Int], placeholder: Bool = false) throws {
        for id in ids where id >= model.vocabSize && !(placeholder && id == model.imageTokenId) {
            throw KeyFault(key, "token \(id) is not in a vocabulary of \(model.vocabSize)")
        }
    }
    try known("model.bos_token_id", model.bosTokenId.map { [$0] } ?? [])
    try known("model.eos_token_ids", model.eosTokenIds)
    try known("model.pad_token_id", [model.padTokenId])
    for (index, example) in manifest.prompt.examples.enumerated() {
        try known("prompt.examples.\(index).input_ids", example.inputIds, placeholder: true)
    }
    for (index, conversation) in manifest.conversations.enumerated() {
        try known("conversations.\(index).input_ids", conversation.inputIds, placeholder: true)
        try known("conversations.\(index).answer_ids", conversation.answerIds)
        let length = conversation.inputIds.count + conversation.answerIds.count
        if length > model.contextLength {
            throw KeyFault(
                "conversations.\(index)", "\(length) tokens do not fit a context of \(model.contextLength)")
        }
    }
}

/// Whether what draws is there, whole, and of one size throughout.
private func drawingFaults(_ manifest: Manifest) throws {
    guard let generation = manifest.generation else { return }
    let stepwise = ["denoiser", "image_decoder"]
    let (wanted, others) = generation.schedules == nil ? (["generator"], stepwise) : (stepwise, ["generator"])
    for name in ["output_projector"] + wanted where manifest.parts[name] == nil {
        throw KeyFault("generation", "the part '\(name)' is missing")
    }
    for name in others where manifest.parts[name] != nil {
        let are = generation.schedules == nil ? "miss" : "are"
        throw KeyFault("generation.schedules", "\(are), but there is a part '\(name)'")
    }
    let projector = manifest.parts["output_projector"]!
    let signals = generation.signalTokenIds
    if signals.last! >= manifest.model.vocabSize || signals != Array(signals[0]..<signals[0] + signals.count) {
        throw KeyFault("generation.signal_token_ids", "must follow each other, inside the vocabulary")
    }
    if product(generation.noiseShape) ?? .max > Noise.most {
        throw KeyFault("generation.noise.shape", "has more than \(Noise.most) numbers")
    }
    let known = Dictionary(
        (projector.inputs + projector.outputs).map { ($0.name, $0.shape) }, uniquingKeysWith: { _, last in last })
    guard let words = known["signal_logits"]?.last?.size, words <= manifest.model.vocabSize else {
        throw KeyFault("parts.output_projector.inputs", "'signal_logits' must end in some of the vocabulary's words")
    }
    let condition = (known["condition"] ?? []).map(\.size)
    if condition.isEmpty || condition.contains(nil) {
        throw KeyFault("parts.output_projector.outputs", "'condition' must have a fixed shape")
    }
    let logits = [1, signals.count, words]
    try interfaceFaults(manifest, "output_projector", [("signal_logits", logits)], [("condition", condition)])
    let picture = [("picture", [1, 3, generation.height, generation.width] as [Int?])]
    guard let schedules = generation.schedules else {
        let inputs = [("condition", condition), ("noise", generation.noiseShape)]
        return try interfaceFaults(manifest, "generator", inputs, picture)
    }
    try scheduleFaults(generation, schedules)
    let latents: [Int?] = [1] + generation.noiseShape[2...].map(Optional.some)
    let inputs = [("latents", latents), ("condition", condition), ("noise", latents), ("scales", [5])]
    try interfaceFaults(manifest, "denoiser", inputs, [("next_latents", latents)])
    try interfaceFaults(manifest, "image_decoder", [("latents", latents)], picture)
}

/// Whether a part has these tensors of floating-point numbers, and no other.
private func interfaceFaults(
    _ manifest: Manifest, _ name: String, _ inputs: [(String, [Int?])], _ outputs: [(String, [Int?])]
) throws {
    let part = manifest.parts[name]!
    for (side, tensors, shapes) in [("inputs", part.inputs, inputs), ("outputs", part.outputs, outputs)] {
        for (tensor, shape) in shapes { try tensorFault("parts.\(name).\(side)", tensors, tensor, shape) }
        for tensor in tensors where !shapes.contains(where: { $0.0 == tensor.name }) {
            throw KeyFault("parts.\(name).\(side)", "\(shown(tensor.name)) is none that a session knows")
        }
    }
}

/// Whether there is one for each number of steps, and noise for all.
private func scheduleFaults(_ generation: Generation, _ schedules: [[[Float]]]) throws {
    let counts = schedules.map(\.count)
    guard Set(counts).count == counts.count, let rows = schedules.first(where: { $0.count == generation.steps }) else {
        throw KeyFault(
            "generation.schedules", "must be one for each number of steps, \(generation.steps) among them")
    }
    let (shape, noises) = (generation.noiseShape, Generation.noises(rows))
    if shape.count != 5 || Array(shape.prefix(2)) != [1, noises] {
        throw KeyFault(
            "generation.noise.shape", "is \(shape), where (1, \(noises), channels, height, width) is expected")
    }
    let most = schedules.map(Generation.noises).max()!
    if product([most] + shape[2...]) ?? .max > Noise.most {
        throw KeyFault("generation.schedules", "take more than \(Noise.most) numbers of noise")
    }
}

private let floats: [DType] = [.float32, .float16]

private func required(_ manifest: Manifest) throws {
    for name in manifest.image == nil ? ["embed", "decoder"] : ["vision", "embed", "decoder"]
    where manifest.parts[name] == nil {
        throw KeyFault("parts", "the part '\(name)' is missing")
    }
    if manifest.image == nil && manifest.parts["vision"] != nil {
        throw KeyFault("image", "is null, but there is a part 'vision'")
    }
}

/// Whether the parts' tensors are those of the ONNX contract, in the model's sizes.
private func onnxFaults(_ manifest: Manifest) throws {
    let model = manifest.model
    for (name, part) in manifest.parts.sorted(by: { $0.key < $1.key }) {
        if !part.file.hasSuffix(".onnx") {
            throw KeyFault("parts.\(name).file", "must be an .onnx file in a bundle for onnx")
        }
    }
    try required(manifest)
    let hidden = model.hiddenSize
    let (embed, decoder) = (manifest.parts["embed"]!, manifest.parts["decoder"]!)
    if let image = manifest.image {
        let vision = manifest.parts["vision"]!
        let pixels = [nil, 3, image.height, image.width]
        try tensorFault("parts.vision.inputs", vision.inputs, "pixels", pixels, [.uint8])
        try tensorFault("parts.vision.outputs", vision.outputs, "image_features", [nil, hidden])
        try tensorFault("parts.embed.inputs", embed.inputs, "image_features", [nil, hidden])
    }
    try tensorFault("parts.embed.inputs", embed.inputs, "input_ids", [nil, nil], [.int64, .int32])
    try tensorFault("parts.embed.outputs", embed.outputs, "inputs_embeds", [nil, nil, hidden])
    try tensorFault("parts.decoder.inputs", decoder.inputs, "inputs_embeds", [nil, nil, hidden])
    try tensorFault("parts.decoder.outputs", decoder.outputs, "logits", [nil, nil, model.vocabSize])
    let cache = [nil, model.numKeyValueHeads, nil, model.headDim]
    for (side, tensors, stem) in [
        ("inputs", decoder.inputs, "past_key_values."), ("outputs", decoder.outputs, "present."),
    ] {
        // Layers are counted first: a stranger's number of them must not make millions of names.
        let found = Set(tensors.map(\.name).filter { $0.hasPrefix(stem) })
        let wanted = found.count == 2 * model.numLayers ? cacheNames(stem, model.numLayers) : []
        if wanted.isEmpty || found != Set(wanted) {
            throw KeyFault(
                "parts.decoder.\(side)",
                "keys and values of \(found.count / 2) layers, where the model has \(model.numLayers)")
        }
        for name in wanted { try tensorFault("parts.decoder.\(side)", tensors, name, cache, floats + [.int8]) }
    }
}

private func filesEnd(in ending: String, _ kind: String, _ manifest: Manifest) throws {
    for (name, part) in manifest.parts.sorted(by: { $0.key < $1.key }) where !part.file.hasSuffix(ending) {
        throw KeyFault("parts.\(name).file", "must be \(kind) in a bundle for \(manifest.target)")
    }
}

/// Whether the parts are packages with the tensors that ``CoreMLBackend`` feeds and reads.
private func coremlFaults(_ manifest: Manifest) throws {
    let model = manifest.model
    try filesEnd(in: ".mlpackage", "an .mlpackage", manifest)
    try required(manifest)
    let (embed, decoder) = (manifest.parts["embed"]!, manifest.parts["decoder"]!)
    if manifest.image != nil {
        let vision = manifest.parts["vision"]!
        if !vision.inputs.contains(where: { $0.name == "pixels" }) {
            throw KeyFault("parts.vision.inputs", "'pixels' is missing")
        }
        try tensorFault("parts.vision.outputs", vision.outputs, "image_features", [nil, model.hiddenSize])
    }
    try tensorFault("parts.embed.inputs", embed.inputs, "input_ids", [nil, nil], [.int32])
    try tensorFault("parts.embed.outputs", embed.outputs, "inputs_embeds", [nil, nil, model.hiddenSize])
    try tensorFault("parts.decoder.inputs", decoder.inputs, "inputs_embeds", [nil, nil, model.hiddenSize])
    try tensorFault("parts.decoder.inputs", decoder.inputs, "position_ids", [nil, nil], [.int32])
    try tensorFault("parts.decoder.outputs", decoder.outputs, "logits", [nil, nil, model.vocabSize])
}

/// Whether the parts' tensors are those of the ExecuTorch contract, in the model's sizes.
private func executorchFaults(_ manifest: Manifest) throws {
    let model = manifest.model
    try filesEnd(in: ".pte", "a .pte file", manifest)
    try required(manifest)
    let (embed, decoder) = (manifest.parts["embed"]!, manifest.parts["decoder"]!)
    let hidden = model.hiddenSize
    if let image = manifest.image {
        let vision = manifest.parts["vision"]!
        try tensorFault("parts.vision.inputs", vision.inputs, "image", [1, 3, image.height, image.width], [.uint8])
        let features = [1, model.numImageTokens, hidden]
        try tensorFault("parts.vision.outputs", vision.outputs, "image_features", features)
    }
    try tensorFault("parts.embed.inputs", embed.inputs, "tokens", [1, nil], [.int64])
    try tensorFault("parts.embed.outputs", embed.outputs, "inputs_embeds", [1, nil, hidden])
    try tensorFault("parts.decoder.inputs", decoder.inputs, "inputs_embeds", [1, nil, hidden])
    try tensorFault("parts.decoder.inputs", decoder.inputs, "cache_position", [1], [.int64])
    if decoder.inputs.contains(where: { $0.name == "position_ids" }) {
        try tensorFault("parts.decoder.inputs", decoder.inputs, "position_ids", [3, 1, nil], [.int64])
    }
    try tensorFault("parts.decoder.outputs", decoder.outputs, "logits", [1, 1, model.vocabSize])
}

/// The cache's tensors, layer by layer: `past_key_values.0.key`, `past_key_values.0.value`, …
func cacheNames(_ stem: String, _ layers: Int) -> [String] {
    (0..<layers).flatMap { ["\(stem)\($0).key", "\(stem)\($0).value"] }
}

private func tensorFault(
    _ key: String, _ tensors: [TensorSpec], _ name: String, _ sizes: [Int?], _ dtypes: [DType] = floats
) throws {
    guard let tensor = tensors.first(where: { $0.name == name }) else { throw KeyFault(key, "'\(name)' is missing") }
    if !dtypes.contains(tensor.dtype) {
        let wanted = dtypes.map(\.rawValue).joined(separator: " or ")
        throw KeyFault(key, "'\(name)' is \(tensor.dtype.rawValue), where \(wanted) is expected")
    }
    let fits =
        tensor.shape.count == sizes.count
        && zip(tensor.shape, sizes).allSatisfy { have, want in want == nil || have.size == nil || have.size == want }
    if !fits {
        let have = tensor.shape.map { if case .named(let name) = $0 { name } else { String($0.size!) } }
        let wanted = sizes.map { $0.map(String.init) ?? "any" }.joined(separator: ", ")
        throw KeyFault(
            key, "'\(name)' has the shape \(shown(have.joined(separator: ", "))), where \(wanted) is expected")
    }
}
