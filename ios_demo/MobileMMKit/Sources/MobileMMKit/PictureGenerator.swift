/// A condition and a seed → a picture, by the parts of a bundle that draw: in one graph, or step by step.
struct PictureGenerator {
    private let bundle: ModelBundle
    private let backend: any Backend
    private let generation: Generation
    private let words: Int
    /// Of each step what `scales` is; nil where all steps are one graph.
    private let rows: [[Float]]?

    /// What a bundle draws with; nil if it does not. Throws ``MobileMMError`` for steps that it does not draw in.
    static func open(_ bundle: ModelBundle, _ backend: any Backend, steps: Int?) throws -> PictureGenerator? {
        func refused(_ why: String) -> MobileMMError {
            MobileMMError("\(bundle.folder.path): \(steps ?? 0) steps are wanted, but this bundle \(why)")
        }
        guard let generation = bundle.manifest.generation else {
            if steps != nil { throw refused("does not draw") }
            return nil
        }
        let projector = bundle.manifest.parts["output_projector"]!
        let words = projector.inputs.first { $0.name == "signal_logits" }!.shape[2].size!
        let count = steps ?? generation.steps
        guard let schedules = generation.schedules else {
            if count != generation.steps {
                throw refused("draws in \(generation.steps): export it with --stepwise, or with --steps \(count)")
            }
            return PictureGenerator(bundle: bundle, backend: backend, generation: generation, words: words, rows: nil)
        }
        guard let rows = schedules.first(where: { $0.count == count }) else {
            let known = schedules.map { "\($0.count)" }.joined(separator: ", ")
            throw refused("draws in \(known): export it with --stepwise --steps \(count)")
        }
        return PictureGenerator(bundle: bundle, backend: backend, generation: generation, words: words, rows: rows)
    }

    /// Of a drawing.
    var steps: Int { rows?.count ?? generation.steps }

    /// Whether each step is a call of its own.
    var isStepwise: Bool { rows != nil }

    /// Room for logits (1, signal tokens, words): those of the vocabulary's first words tell what is drawn.
    func signals() throws -> Tensor { try Tensor(.float32, [1, generation.signalTokenIds.count, words]) }

    /// The picture. `onStep` is called behind each step but the last of a drawing that is made step by step, with
    /// its number, how many there are, and what decodes the picture so far; it may throw to end it.
    ///
    /// Throws ``MobileMMError`` for parts that give something else than the manifest says.
    func draw(
        _ signals: Tensor, seed: UInt64, onStep: (Int, Int, () throws -> PixelRaster) throws -> Void = { _, _, _ in }
    ) throws -> PixelRaster {
        let condition = try condition(signals)
        guard isStepwise else {
            let noise = try Noise.normal(seed: seed, generation.noiseShape)
            return try picture(of: "generator", ["condition": condition, "noise": noise])
        }
        return try decode(
            try latents(condition, seed: seed) { step, latents in
                if step < steps { try onStep(step, steps) { try decode(latents) } }
            })
    }

    /// What the logits ask for, (1, tokens, width).
    func condition(_ signals: Tensor) throws -> Tensor {
        let found = try backend.run("output_projector", ["signal_logits": signals])
        return try output("condition", of: "output_projector", in: found)
    }

    /// Behind the last step of a drawing that is made step by step, (1, channels, height, width); `onStep` is given
    /// each step's number, from 1 on, and what it made.
    func latents(_ condition: Tensor, seed: UInt64, onStep: (Int, Tensor) throws -> Void) throws -> Tensor {
        let rows = rows!
        let shape = [1] + generation.noiseShape[2...]
        // One for the beginning, and one for each step that renews.
        let noise = try Noise.normal(seed: seed, [Generation.noises(rows)] + shape[1...])
        let none = try Tensor(.float32, shape)
        var (latents, used) = (try noise.slice(axis: 0, 0..<1), 0)
        for (index, row) in rows.enumerated() {
            if row[4] != 0 { used += 1 }
            let found = try backend.run(
                "denoiser",
                [
                    "latents": latents, "condition": condition,
                    "noise": row[4] != 0 ? try noise.slice(axis: 0, used..<used + 1) : none,
                    "scales": try Tensor(floats: row, [5]),
                ])
            latents = try output("next_latents", of: "denoiser", in: found)
            if latents.shape != shape { throw refusal("denoiser", "latents of \(latents.shape), not \(shape)") }
            try onStep(index + 1, latents)
        }
        return latents
    }

    /// The picture of latents.
    func decode(_ latents: Tensor) throws -> PixelRaster { try picture(of: "image_decoder", ["latents": latents]) }

    /// Gives the parts' memory back.
    func release() {
        let drawing = rows == nil ? ["generator"] : ["denoiser", "image_decoder"]
        for part in ["output_projector"] + drawing { backend.release(part) }
    }

    private func picture(of part: String, _ inputs: [String: Tensor]) throws -> PixelRaster {
        let picture = try output("picture", of: part, in: try backend.run(part, inputs))
        let shape = [1, 3, generation.height, generation.width]
        if picture.shape != shape { throw refusal(part, "a picture of \(picture.shape), not \(shape)") }
        return PixelRaster(unit: picture.floats, width: generation.width, height: generation.height)
    }

    private func refusal(_ part: String, _ wrong: String) -> MobileMMError {
        MobileMMError("\(bundle.folder.path): part '\(part)' gave \(wrong); \(ManifestReader.again)")
    }
}

extension Generation {
    /// How many noises a drawing by these rows takes.
    static func noises(_ rows: [[Float]]) -> Int { 1 + rows.count { $0[4] != 0 } }
}
