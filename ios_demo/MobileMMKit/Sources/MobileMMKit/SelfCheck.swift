import Foundation

/// One thing that was checked: `part` names a part, or "conversation".
public struct Check: Sendable, Equatable {
    public let part: String
    public let passed: Bool
    public let text: String
}

/// The bundle's own proof, golden vectors and a conversation, on this very device.
///
/// A part must come as close to the vectors as the manifest says; a near-tie of the conversation may fall otherwise on
/// a processor that did not make it, and the vectors tell whether that is all.
public actor SelfCheck {
    private let bundle: ModelBundle
    private let backend: any Backend
    private let thread = ComputeThread()

    public init(_ bundle: ModelBundle, _ backend: any Backend) {
        (self.bundle, self.backend) = (bundle, backend)
    }

    public nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

    /// Each check as it is done; `report` gets them one by one. Throws ``Cancelled`` when the backend is cancelled.
    public func run(report: @Sendable (Check) -> Void = { _ in }) async throws -> [Check] {
        var checks: [Check] = []
        backend.resume()
        for golden in bundle.manifest.golden {
            let check: Check
            do {
                check = try part(golden)
            } catch let error as MobileMMError {
                check = Check(part: golden.part, passed: false, text: oneLine(error))
            }
            checks.append(check)
            report(check)
        }
        for golden in bundle.manifest.conversations {
            let check = try await conversation(golden)
            checks.append(check)
            report(check)
        }
        return checks
    }

    private func part(_ golden: Golden) throws -> Check {
        let file = try bundle.file(golden.file)
        let tensors = try SafeTensors.read(file)
        func side(_ prefix: String) -> [String: Tensor] {
            Dictionary(
                uniqueKeysWithValues: tensors.filter { $0.key.hasPrefix(prefix) }
                    .map { (String($0.key.dropFirst(prefix.count)), $0.value) })
        }
        let (inputs, wanted) = (side("inputs."), side("outputs."))
        if wanted.isEmpty { throw MobileMMError("\(file.path): no output at all") }
        var ratios: [Double] = []
        if golden.part == "decoder" {
            guard let embeds = inputs["inputs_embeds"], let expected = wanted["logits"] else {
                throw MobileMMError("\(file.path): no inputs_embeds, or no logits")
            }
            let decoder = try backend.decoder()
            let logits = try decoder.decode(try embeds.toFloats(), positions: inputs["position_ids"])
            ratios.append(snr(logits, try expected.toFloats().floats))
        } else {
            let found = try backend.run(golden.part, inputs)
            for (name, expected) in wanted {
                let output = try output(name, of: golden.part, in: found)
                let wanted = try expected.toFloats()
                let sameShape = output.shape == wanted.shape
                ratios.append(sameShape ? snr(output.floats, wanted.floats) : -maxDb)
            }
            if let sums = try tensors["row_sums"]?.toFloats() {
                ratios.append(snr(try rowSums().floats, sums.floats))
            }
        }
        let worst = ratios.min()!
        let text = String(format: "%.1f dB to its golden vectors", worst)
        if worst >= golden.floorDb { return Check(part: golden.part, passed: true, text: text) }
        let wish = String(format: "%.0f", golden.floorDb)
        return Check(part: golden.part, passed: false, text: "\(text), at least \(wish) dB is wanted")
    }

    private func conversation(_ golden: GoldenConversation) async throws -> Check {
        let sampling = Sampling(maxNewTokens: max(1, golden.answerIds.count))
        let answer: String
        do {
            let session = try await Session(bundle, backend, sampling: sampling)
            if let image = golden.image { try await session.lookAt(try PictureFile.read(try bundle.file(image))) }
            answer = try await session.reply(golden.prompt)
        } catch let error as MobileMMError {
            return Check(part: "conversation", passed: false, text: oneLine(error))
        }
        if answer == golden.answer {
            return Check(part: "conversation", passed: true, text: "answers as when it was made: \(shown(answer))")
        }
        let made = shown(golden.answer)
        return Check(
            part: "conversation", passed: true,
            text: "answers \(shown(answer)); where it was made it was \(made) (a near-tie)")
    }

    /// Of each row of the embedding's table the sum: that no row was changed, also those that no prompt looks up.
    private func rowSums() throws -> Tensor {
        let model = bundle.manifest.model
        var sums: [Float] = []
        for start in stride(from: 0, to: model.vocabSize, by: 512) {
            let ids = Array(start..<min(start + 512, model.vocabSize))
            let rows = try embed(backend, model, ids).floats
            for row in ids.indices {
                var sum = 0.0
                for column in 0..<model.hiddenSize { sum += Double(rows[row * model.hiddenSize + column]) }
                sums.append(Float(sum))
            }
        }
        return try Tensor(floats: sums, [model.vocabSize])
    }
}

private let maxDb = 200.0

/// 10 log10 of the wanted energy over the error's, within ±200; -200 for another size or NaN.
func snr(_ found: Values<Float>, _ wanted: Values<Float>) -> Double {
    if found.count != wanted.count { return -maxDb }
    var (signal, noise) = (0.0, 0.0)
    for index in 0..<wanted.count {
        let error = Double(found[index]) - Double(wanted[index])
        signal += Double(wanted[index]) * Double(wanted[index])
        noise += error * error
    }
    if !noise.isFinite { return -maxDb }
    if noise == 0 { return maxDb }
    return signal == 0 ? -maxDb : min(max(10 * log10(signal / noise), -maxDb), maxDb)
}
