#if canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    final class BenchmarkTests: XCTestCase {
        /// Read by the Python package in tests/ios/test_benchmark_result.py, which knows the schema.
        func testEveryFigureIsMeasuredAsOftenAsAsked() async throws {
            let bundle = try Vectors.bundle.get()
            var settings = BenchmarkSettings()
            (settings.promptTokens, settings.newTokens, settings.runs, settings.threads) = (16, 4, 2, 1)
            let backend = try OnnxBackend(bundle, threads: 1)
            let figures = try await Benchmark(bundle, backend, settings).run()
            XCTAssertEqual(
                figures.map(\.name),
                ["load_warm", "resize", "vision", "ttft", "pp16", "tg4", "token", "draw", "draw_step"])
            XCTAssertEqual(figures.map(\.runs.count), [1, 2, 2, 2, 2, 2, 8, 2, 2])
            for figure in figures { XCTAssertGreaterThan(figure.runs.min()!, 0, figure.name) }
            XCTAssertEqual(Figure(name: "", what: "", unit: "", runs: [4, 1, 3, 2]).median, 2.5)
            let result = try BenchmarkResult(bundle, figures, settings, device: "tests", runtime: backend.runtime)
            try result.json().write(to: Vectors.file("benchmark.json"))
        }

        func testEachStepOfADrawingIsMeasuredWhereItIsACallOfItsOwn() async throws {
            let folder = ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]!
            let bundle = try ModelBundle.open(URL(fileURLWithPath: "\(folder)/stepwise/drawer-onnx"))
            var settings = BenchmarkSettings()
            (settings.promptTokens, settings.newTokens, settings.images, settings.runs) = (8, 2, 0, 3)
            let backend = try OnnxBackend(bundle, threads: 1)
            let figures = try await Benchmark(bundle, backend, settings).run()
            let found = Dictionary(uniqueKeysWithValues: figures.map { ($0.name, $0.runs) })
            let (draw, steps) = (try XCTUnwrap(found["draw"]), try XCTUnwrap(found["draw_step"]))
            XCTAssertEqual(draw.count, 3)
            XCTAssertEqual(steps.count, 3 * 4)
            XCTAssertGreaterThan(steps.min()!, 0)
            // The output projector and the image decoder come on top.
            XCTAssertLessThan(steps.reduce(0, +), draw.reduce(0, +))
            XCTAssertNil(found["vision"])
            let result = try BenchmarkResult(bundle, figures, settings, device: "tests", runtime: backend.runtime)
            try result.json().write(to: Vectors.file("benchmark-stepwise.json"))
        }
    }
#endif
