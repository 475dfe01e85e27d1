-- One row per flight of 2013 out of New York: only what is known at its scheduled departure.
--
-- Left out on purpose: dep_time, dep_delay, arr_time and air_time (known only afterwards), and any
-- statistic over other flights' delays. Left out because they did not help on the valid rows:
-- tailnum (4037 planes) and the month (train ends in August; the weather tells the season).
-- Cancelled and diverted flights have no arr_delay, so they have neither target and extract drops
-- and counts them.
-- Times: year, month, day, hour and minute are New York's clock, as scheduled; time_hour is the
-- same hour in UTC, so the weather joins on it without trouble at the change of the clock (on
-- 3 November the local hour 1 comes twice). All joins are many to one; params.yaml declares them
-- and extract checks them.
WITH scheduled AS (
  SELECT
    *,
    make_timestamp("year", "month", "day", "hour", "minute", 0) AS departure,
    "hour" * 60 + "minute" AS departure_minute,
    sched_arr_time // 100 * 60 + sched_arr_time % 100 AS arrival_minute
  FROM flights
)
SELECT
  -- identity, and the clock that splits the rows
  s.departure,
  s.carrier,
  s.flight,
  s.origin,
  -- what is to be predicted
  s.arr_delay,
  s.arr_delay > 15 AS late,
  -- schedule
  s.dest,
  s.distance,
  isodow(s.departure) AS weekday,
  s.departure_minute,
  s.arrival_minute,
  -- the airline's plan for gate to gate; tz is the airport's standard offset in hours
  (s.arrival_minute - s.departure_minute - 60 * (d.tz + 5) + 2880) % 1440 AS planned_minutes,
  count(*) OVER (PARTITION BY s.origin, s.time_hour) AS departures_in_hour,
  -- weather at the origin in the scheduled hour
  w."temp",
  w.dewp,
  w.humid,
  w.wind_dir,
  w.wind_speed,
  w.wind_gust,
  w.precip,
  w.pressure,
  w.visib,
  -- the plane
  p."year" AS plane_year,
  p."type" AS plane_type,
  p.manufacturer,
  p.model,
  p.engines,
  p.seats,
  p.engine,
  -- the destination
  d.lat AS dest_lat,
  d.lon AS dest_lon,
  d.alt AS dest_alt
FROM scheduled AS s
LEFT JOIN weather AS w ON w.origin = s.origin AND w.time_hour = s.time_hour
LEFT JOIN planes AS p ON p.tailnum = s.tailnum
LEFT JOIN airports AS d ON d.faa = s.dest
