#if canImport(CoreML) && canImport(COnnxRuntime)
    import CoreML
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// The Core ML backend over a stand-in for Core ML, which answers from a run recorded on the reference interpreter,
    /// and knows the packages' own specifications.
    final class CoreMLTests: XCTestCase {
        private static let bundle = Result { try Recorded.open("MOBILEMM_COREML_BUNDLE") }
        private static let stepwise = Result { try Recorded.stepwise("coreml") }
        /// The model that ships with mobilemm.
        private static let full = Result { try Recorded.open("MOBILEMM_COREML_DEFAULT") }

        func testAConversationAboutTwoPicturesAndADrawingArePythonsTokenForToken() async throws {
            let replay = try await Recorded.replay(try Self.bundle.get())
            XCTAssertGreaterThanOrEqual(replay.tokens.count, 4 * 65)
            XCTAssertGreaterThanOrEqual(replay.drawings, 2)
        }

        func testStepByStepItSketchesAndDrawsAsInPython() async throws {
            for keepVision in [true, false] {
                let replay = try await Recorded.replay(try Self.stepwise.get(), keepVision: keepVision)
                XCTAssertGreaterThanOrEqual(replay.drawings, 3)
                // A drawing in each of 1, 2 and 4 steps at least.
                XCTAssertNil(replay.sketches[1])
                XCTAssertGreaterThanOrEqual(replay.sketches[2, default: 0], 1)
                XCTAssertGreaterThanOrEqual(replay.sketches[4, default: 0], 3)
            }
        }

        func testReleasingThePartsThatSeeAndDrawChangesNothing() async throws {
            _ = try await Recorded.replay(try Self.bundle.get(), keepVision: false)
        }

        /// The real packages' names, shapes, types and states.
        func testTheDefaultModelAnswersAboutAPictureAsInPython() async throws {
            let bundle = try Self.full.get()
            let replay = try await Recorded.replay(bundle)
            XCTAssertGreaterThanOrEqual(replay.tokens.count, 8)
            XCTAssertEqual(replay.drawings > 0, bundle.manifest.generation != nil)
        }

        func testInputsThatWereNotRecordedAreRefusedByTheStandIn() async throws {
            let bundle = try Self.bundle.get()
            let backend = try await openBackend(bundle)
            let session = try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 3))
            let error = await failure { try await session.reply("Something else.") }
            assertOneLine(error, "recorded")
            let count = await session.messages.count
            XCTAssertEqual(count, 0)
        }

        func testThePlanTellsWhereOperationsRun() async throws {
            let backend = try await CoreMLBackend.open(try Self.bundle.get())
            let plan = try await backend.plan("decoder")
            XCTAssertEqual(Array(plan.keys), ["CPU"])
            XCTAssertGreaterThan(plan["CPU"]!, 50)
        }

        func testAManifestThatSaysOtherThanThePackageIsRefused() async throws {
            let (whole, stepwise) = (try Self.bundle.get(), try Self.stepwise.get())
            var changes = [
                (whole, "\"last_index\"", "\"last_place\"", "last_index"),
                (whole, "\"pixels\"", "\"picture\"", "pixels"),
            ]
            for name in ["latents", "next_latents", "picture"] {
                let half = "\"name\": \"\(name)\",\n     \"dtype\": \"float16\""
                changes.append((stepwise, half, half.replacingOccurrences(of: "16", with: "32"), name))
            }
            for (bundle, from, to, word) in changes {
                try await Recorded.changed(bundle, from, to) { folder in
                    let error = await failure {
                        let changed = try ModelBundle.open(folder)
                        let backend = try await openBackend(changed)
                        for part in changed.manifest.parts.keys.sorted() { try backend.load(part) }
                    }
                    assertOneLine(error, word)
                }
            }
        }

        /// What the backend asks for by name is what the packages' specifications have; shapes and types are the
        /// manifest's, and the states have room for the model's context.
        func testTheNamesShapesAndTypesAreThoseOfThePackages() throws {
            let asked: [String: (inputs: Set<String>, outputs: Set<String>)] = [
                "vision": (["pixels"], ["image_features"]),
                "embed": (["input_ids"], ["inputs_embeds"]),
                "prefill": (["inputs_embeds", "position_ids", "last_index"], ["logits"]),
                "decode": (["inputs_embeds", "position_ids"], ["logits"]),
                "output_projector": (["signal_logits"], ["condition"]),
                "generator": (["condition", "noise"], ["picture"]),
                "denoiser": (["latents", "condition", "noise", "scales"], ["next_latents"]),
                "image_decoder": (["latents"], ["picture"]),
            ]
            var seen: Set<String> = []
            for bundle in [try Self.bundle.get(), try Self.stepwise.get(), try Self.full.get()] {
                let interfaces = try Json.parse(try Recorded.data(bundle, "interfaces.json")).object!
                XCTAssertEqual(Set(interfaces.names), Set(bundle.manifest.parts.keys))
                for (name, part) in bundle.manifest.parts {
                    for function in interfaces.objects(name) {
                        let called = function.string("name")
                        let key = called == "main" ? name : called.hasPrefix("prefill") ? "prefill" : called
                        let names = try XCTUnwrap(asked[key], key)
                        seen.insert(key)
                        for (side, specs, wanted) in [
                            ("inputs", part.inputs, names.inputs), ("outputs", part.outputs, names.outputs),
                        ] {
                            let features = function.objects(side)
                            XCTAssertEqual(Set(features.map { $0.string("name") }), wanted, "\(name) \(side)")
                            for feature in features {
                                let spec = try XCTUnwrap(specs.first { $0.name == feature.string("name") })
                                assertAgree(spec, feature, name)
                            }
                        }
                        let model = bundle.manifest.model
                        let room = [model.numLayers, model.numKeyValueHeads, model.contextLength, model.headDim]
                        let states = function.objects("states")
                        XCTAssertEqual(states.map { $0.string("name") }, name == "decoder" ? ["k_cache", "v_cache"] : [])
                        for state in states { XCTAssertEqual(state.ints("shape"), room) }
                    }
                }
            }
            XCTAssertEqual(seen, Set(asked.keys))
        }

        private func assertAgree(_ spec: TensorSpec, _ feature: JsonObject, _ part: String) {
            let (name, sizes) = ("\(part): \(spec.name)", feature.ints("shape"))
            XCTAssertEqual(spec.dtype.rawValue, feature.string("dtype"), name)
            // An output's shape may be known only when it has run.
            if sizes.isEmpty { return }
            XCTAssertEqual(spec.shape.count, sizes.count, name)
            let ranges = feature["ranges"]!.array
            for (axis, (wanted, size)) in zip(spec.shape, sizes).enumerated() {
                if let fixed = wanted.size {
                    XCTAssertEqual(fixed, size, name)
                    if let range = ranges?[axis].array { XCTAssertEqual(range.map(\.whole), [fixed, fixed], name) }
                }
            }
        }
    }
#endif
